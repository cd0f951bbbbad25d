"""Probes, report and evaluation of the trainer of examples/."""

from __future__ import annotations

from mutant import Mutant

PARTS = "examples/simclr/"
PROBE, REPORT = "tests/test_trainer_probe.py::test_", "tests/test_trainer_report.py::test_"
EVALUATE = "tests/test_trainer_evaluate.py::test_"

PROBES = [
    Mutant("a class without a vote is named", PARTS + "probe.py", "votes.masked_fill(votes == 0, -math.inf)", "votes",
           PROBE + "neighbours_vote_by_their_cosine"),
    Mutant("neighbours vote alike", PARTS + "probe.py", "((similarity - 1) / temperature).exp()",
           "torch.ones_like(similarity)", PROBE + "neighbours_vote_by_their_cosine"),
    Mutant("the first four", PARTS + "probe.py", "min(5, logits.shape[1])", "min(4, logits.shape[1])",
           PROBE + "scores_by_hand"),
    Mutant("top-1 among all", PARTS + "probe.py", "hit[:, 0].float()", "hit.any(1).float()", PROBE + "scores_by_hand"),
    Mutant("features as they are", PARTS + "probe.py", "(features.train - mean) / std, (features.test - mean) / std",
           "features.train, features.test", PROBE + "scale_and_place_of_features_do_not_matter"),
    Mutant("SGD: rows of any length", PARTS + "probe.py", "scale = rows.shape[1] ** -0.5", "scale = 1.0",
           PROBE + "sgd_is_momentum_with_a_cosine_over_shuffled_epochs"),
    Mutant("SGD: a rate that stays", PARTS + "probe.py", "        schedule.step()\n", "",
           PROBE + "sgd_is_momentum_with_a_cosine_over_shuffled_epochs"),
    Mutant("SGD: the program's random numbers", PARTS + "probe.py", "torch.randperm(len(rows), generator=generator)",
           "torch.randperm(len(rows))", PROBE + "probes_draw_no_random_number"),
    Mutant("L-BFGS: without penalty", PARTS + "probe.py", "penalty / 2 * weight.square().sum()", "0",
           PROBE + "lbfgs_finds_the_minimum"),
    Mutant("the encoder stays in eval mode", PARTS + "probe.py", "    encoder.train(was_training)\n", "",
           PROBE + "extract_reads_what_can_be_read_in_eval_mode"),
]
PAGES = [
    Mutant("text is not escaped", PARTS + "page.py", "else html.escape(str(child)) for", "else str(child) for",
           REPORT + "names_are_text"),
    Mutant("attributes are not escaped", PARTS + "page.py", "html.escape(str(value)) for key", "str(value) for key",
           REPORT + "names_are_text"),
    Mutant("names that are no text", PARTS + "report.py", 'errors="backslashreplace"', 'errors="ignore"',
           REPORT + "names_are_text"),
    Mutant("grey points above", PARTS + "sheets.py", "key=lambda i: labels[i] in colours",
           "key=lambda i: labels[i] not in colours", REPORT + "map_has_colours_for_twenty_classes"),
    Mutant("every frame is right", PARTS + "sheets.py", '"right" if other == label else "wrong"', '"right"',
           REPORT + "frames_of_neighbours_tell_classes"),
    Mutant("views draw from the stream", PARTS + "sheets.py", "with drawing_from(seed + index):", "if True:",
           REPORT + "a_report_draws_no_random_number"),
    Mutant("a picture that went away", PARTS + "page.py", 'tag("div", "?", class_="gone", title=alt)', "Html()",
           REPORT + "pictures_that_can_be_read_no_more"),
    Mutant("rows that are all alike are laid out", PARTS + "maps.py", "max() > ALIKE", "max() >= 0",
           REPORT + "flat_map_of_nothing_to_lay_out"),
    Mutant("directions at any angle", PARTS + "maps.py", "torch.linalg.qr(draw).Q.to(rows)", "draw.to(rows)",
           REPORT + "directions_are_orthogonal_and_unit"),
    Mutant("the sphere of one dimension less", PARTS + "maps.py", "(width - 3) / 2 * (1", "(width - 4) / 2 * (1",
           REPORT + "density_of_a_prior"),
    Mutant("chance of another method", PARTS + "report.py", 'if method == "moco-v2":', "if False:",
           REPORT + "chance_is_that_of_the_method"),
    Mutant("untrained is the last probe", PARTS + "report.py", "before = points[0][1] if", "before = points[-1][1] if",
           REPORT + "summary"),
    Mutant("top-5 of five classes", PARTS + "report.py", "len(run.source.classes) > 5", "len(run.source.classes) > 4",
           REPORT + "top5_of_few_classes_says_nothing"),
    Mutant("a switch that was turned off", PARTS + "report.py", "if value is False and name in NEGATED:", "if False:",
           REPORT + "commands_are_the_run_again"),
]
EVALUATION = [
    Mutant("the average's encoder", "examples/evaluate.py", 'ENCODER = "network.encoder."',
           'ENCODER = "average.network.encoder."', EVALUATE + "scores_of_a_checkpoint"),
    Mutant("group norm is batch norm", PARTS + "checkpoint.py", 'facts.get("norm") == "group"', "False",
           EVALUATE + "scores_of_a_checkpoint"),
    Mutant("the encoder's channels for the data's", "examples/evaluate.py", "trained on, got {source.channels}",
           "trained on, got {channels}", EVALUATE + "digits_are_grey"),
    Mutant("no folder for the scores, after the work", "examples/evaluate.py",
           "if settings.json and not settings.json.parent.is_dir():", "if False:",
           EVALUATE + "bad_arguments_are_one_line"),
    Mutant("always twenty neighbours", "examples/evaluate.py", "probe.knn_probe(features, settings.k)",
           "probe.knn_probe(features)", EVALUATE + "scores_of_a_checkpoint"),
]
MUTANTS = [*PROBES, *PAGES, *EVALUATION]
