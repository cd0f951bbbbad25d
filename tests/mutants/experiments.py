"""Mutants of what runs the experiments of examples/, and of their data sets."""

from __future__ import annotations

from mutant import Mutant

STUDY, RESULTS = "examples/experiments/study.py", "examples/experiments/results.py"
TRAINING = "examples/experiments/training.py"
DATASETS, SATURATION = "examples/experiments/datasets.py", "examples/experiments/saturation.py"
WEIGHT, NEGATIVES = "examples/experiments/temperature_vs_weight.py", "examples/experiments/negatives.py"
AUGMENTATION, PAGE = "examples/experiments/augmentation.py", "examples/experiments/page.py"
TEST, OF_DATASETS = "tests/test_experiments.py::test_", "tests/test_experiments_datasets.py::test_"
OF_LOSSES, OF_PRACTICES = "tests/test_experiments_losses.py::test_", "tests/test_experiments_practices.py::test_"

MUTANTS = [
    Mutant(
        "a line that was cut stays in front of the next",
        RESULTS,
        'file.truncate(file.read().rfind(b"\\n") + 1)',
        "file.read()",
        TEST + "a_line_that_was_cut_leaves_no_trace",
    ),
    Mutant(
        "one case after another instead of one seed after another",
        STUDY,
        "for seed in range(seeds) for case in cases]",
        "for case in cases for seed in range(seeds)]",
        TEST + "finished_runs_are_kept_and_the_rest_is_done",
    ),
    Mutant(
        "the whole distance between seeds",
        RESULTS,
        "(max(self.values) - min(self.values)) / 2",
        "max(self.values) - min(self.values)",
        TEST + "spreads_and_cells",
    ),
    Mutant(
        "seconds of processes, not of the clock",
        RESULTS,
        'record["seconds"] / record["jobs"]',
        'record["seconds"]',
        TEST + "spreads_and_cells",
    ),
    Mutant(
        "a reduced run takes all its steps",
        STUDY,
        "train[length] = max(least, train[length] // SMOKE_SHARE)",
        "pass",
        TEST + "a_reduced_run_has_a_step_of_twenty_and_one_seed",
    ),
    Mutant(
        "settings of the command line that do nothing",
        STUDY,
        '"train": train | options.settings}',
        '"train": train}',
        TEST + "a_run_with_other_settings_is_another_run",
    ),
    Mutant(
        "supervised targets of other pictures",
        TRAINING,
        "return self.known[index]",
        "return self.known[index - 1]",
        TEST + "supervised_training_learns_the_labels",
    ),
    Mutant(
        "a divergence that likes a narrow posterior",
        TRAINING,
        "log_variance.exp() - 1 - log_variance)",
        "log_variance.exp() - 1 + log_variance)",
        TEST + "the_bound_of_a_variational_autoencoder",
    ),
    Mutant(
        "a page that hides what is left to run",
        PAGE,
        "if left else f",
        "if False else f",
        TEST + "the_page_has_what_came_out",
    ),
    Mutant(
        "two digits in one cell",
        DATASETS,
        "cells = torch.rand(length, GRID**2, generator=generator).argsort(1)",
        "cells = torch.randint(GRID**2, (length, GRID**2), generator=generator)",
        OF_DATASETS + "in_the_grid_every_digit_is_in_the_middle_of_a_cell_of_its_own",
    ),
    Mutant(
        "the last row and column stay empty",
        DATASETS,
        "torch.tensor(self.sizes)[:, None] + 1\n",
        "torch.tensor(self.sizes)[:, None]\n",
        OF_DATASETS + "placed_at_random_every_place_is_as_likely_the_corners_too",
    ),
    Mutant(
        "the later digit hides the one below",
        DATASETS,
        "torch.maximum(there, self.images[size][chosen], out=there)",
        "there.copy_(self.images[size][chosen])",
        OF_DATASETS + "digits_have_the_sizes_of_the_case_and_the_brighter_shows",
    ),
    Mutant(
        "white and a digit is black again",
        DATASETS,
        "added.clamp_(max=255).to(torch.uint8)",
        "added.to(torch.uint8)",
        OF_DATASETS + "a_digit_is_added_at_nine_places_and_clipped_at_white",
    ),
    Mutant(
        "digits at thirds of the side",
        DATASETS,
        "PLACES = (0.15, 0.45, 0.75)",
        "PLACES = (0.2, 0.5, 0.8)",
        OF_DATASETS + "a_digit_is_added_at_nine_places_and_clipped_at_white",
    ),
    Mutant(
        "some digits over no picture",
        DATASETS,
        "self.chosen = order % unique",
        "self.chosen = order * 7919 % len(pictures) % (unique - unique // 2)",
        OF_DATASETS + "every_one_of_the_unique_digits_is_over_as_many_pictures",
    ),
    Mutant(
        "test pictures with the bits of training pictures",
        DATASETS,
        "RandBit(source.test, bits, seed + 1)",
        "RandBit(source.test, bits, seed)",
        OF_DATASETS + "bits_are_decided_by_their_seed_and_the_test_pictures_have_others",
    ),
    Mutant(
        "bits that are cropped and dimmed with the picture",
        DATASETS,
        "bits = bits if bits.is_floating_point() else bits.float() / 255",
        "bits = bits.float() / 256",
        OF_DATASETS + "no_view_touches_the_bits_and_both_views_share_them",
    ),
    Mutant(
        "a floor without the chance that a number comes again",
        SATURATION,
        "total = (again + 1) * math.exp(same) + (batch - 1 - again) * math.exp(other)",
        "total = 0 * again + math.exp(same) + (batch - 1) * math.exp(other)",
        OF_LOSSES + "floor_is_the_term_of_a_simplex_over_all_batches",
    ),
    Mutant(
        "coordinates in units of no root",
        WEIGHT,
        "* math.sqrt(width)",
        "* 1.0",
        OF_LOSSES + "coordinates_follow_the_prior",
    ),
    Mutant(
        "hard negatives that are not",
        NEGATIVES,
        'train["hard_negatives"] = count',
        "pass",
        OF_PRACTICES + "hard_negatives_are_drawn_from_the_whole_queue_as_many_as_it_has",
    ),
    Mutant(
        "parts of half as many rows",
        NEGATIVES,
        "zip(z1.split(self.rows // 2), z2.split(self.rows // 2))",
        "zip(z1.split(self.rows // 4), z2.split(self.rows // 4))",
        OF_PRACTICES + "simclr_parts_are_the_mean_over_blocks_of_the_batch",
    ),
    Mutant(
        "a picture is among its own neighbours",
        AUGMENTATION,
        "others = nearest[nearest != torch.arange(len(rows))[:, None]].view(len(rows), -1)[:, :NEAREST]",
        "others = nearest[:, :NEAREST]",
        OF_PRACTICES + "purity_against_every_pair_compared",
    ),
    Mutant(
        "K is counted by every rank for itself",
        NEGATIVES,
        "Parts(method.criterion, count // _ranks())",
        "Parts(method.criterion, count)",
        OF_PRACTICES + "simclr_parts_are_the_mean_over_blocks_of_the_batch",
    ),
    Mutant(
        "batch norm in parts of parts",
        TRAINING,
        "splits if splits == 1 else max(2, splits // world)",
        "splits",
        TEST + "the_trainer_takes_the_published_sizes_on_so_many_gpus",
    ),
    Mutant(
        "own settings in the page's results",
        STUDY,
        'kinds += ["own"] * bool(given or found.seeds)',
        "kinds += []",
        TEST + "only_a_plain_run_writes_where_the_pages_results_are",
    ),
    Mutant(
        "a figure of other runs stays",
        STUDY,
        'or written.read_text(encoding="utf-8") != table',
        "or False",
        TEST + "a_figure_of_other_settings_gives_way",
    ),
    Mutant(
        "what is said of a desk is said of all",
        PAGE,
        'options.scale == "desk" and named <= shown',
        "True",
        TEST + "what_is_said_of_a_desk_is_not_said_of_other_results",
    ),
    Mutant(
        "data is looked for at the first run that needs it",
        STUDY,
        "                find_data(study, options)\n",
        "",
        TEST + "what_a_later_experiment_lacks_is_said_before_the_first_one",
    ),
]
