"""Mutants of what runs the experiments of examples/, and of their data sets."""

from __future__ import annotations

from mutant import Mutant

STUDY, RESULTS = "examples/experiments/study.py", "examples/experiments/results.py"
TRAINING = "examples/experiments/training.py"
TEST = "tests/test_experiments.py::test_"

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
        "for seed in range(seeds) for case in study.cases(options.scale)]",
        "for case in study.cases(options.scale) for seed in range(seeds)]",
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
        'train["steps"] = max(2, train["steps"] // SMOKE_SHARE)',
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
        "return self.shares[index]",
        "return self.shares[index - 1]",
        TEST + "supervised_training_learns_the_labels",
    ),
    Mutant(
        "a divergence that likes a narrow posterior",
        TRAINING,
        "log_variance.exp() - 1 - log_variance)",
        "log_variance.exp() - 1 + log_variance)",
        TEST + "the_bound_of_a_variational_autoencoder",
    ),
]
