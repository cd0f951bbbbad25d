"""Mutants of the losses that are composed of rows, sums and draws, and of what they are composed of."""

from __future__ import annotations

from mutant import MODULE, Mutant

LOSSES = "tests/test_losses.py::"
LOSS_INPUTS = "tests/test_loss_inputs.py::"
LOSS_RANKS = "tests/test_distributed_losses.py::test_ranks"

ROWS_FILE = "fastcl/ops/rows.py"
ROWS = [
    Mutant(
        "projection of rows on their own dropped",
        "fastcl/ops/chunked.py",
        "dz.addcmul(z, along, value=-1).mul_(rnorm",
        "dz.mul(rnorm",
        LOSSES + "test_shapes[chunked-alignment-17-33-dtype1]",
    ),
    Mutant(
        "1 / length of rows on their own dropped",
        "fastcl/ops/chunked.py",
        ".mul_(rnorm[:, None]).to(dtype)",
        ".to(dtype)",
        LOSSES + "test_shapes[chunked-alignment-17-33-dtype1]",
    ),
    Mutant(
        "terms of rows and columns not exchanged",
        ROWS_FILE,
        "_swapped(z) if swap else z)",
        "z.clone() if swap else z)",
        LOSSES + "test_rows_not_normalised[chunked-uniformity-0.1-dtype1]",
    ),
    Mutant(
        "half missing in the temperature gradient of rows",
        ROWS_FILE,
        "d_scale = 0.5 * (z",
        "d_scale = 1.0 * (z",
        LOSSES + "test_shapes[chunked-lse-17-33-dtype1]",
    ),
    Mutant(
        "log-sum-exps of ranks averaged",
        ROWS_FILE,
        "ranks.gather_number(lse).logsumexp(0)",
        "ranks.gather_number(lse).mean()",
        LOSS_RANKS + "[contract-what=uniformity-2]",
    ),
    Mutant(
        "every rank's rows taken for the first",
        ROWS_FILE,
        "first = 0 if ranks is None else ranks.first_row",
        "first = 0",
        LOSS_RANKS + "[contract-what=generalized_lse-2]",
    ),
    Mutant(
        "log-sum-exps of the wrong rows gathered for rows",
        ROWS_FILE,
        "ranks.gather_rows(lse.to(scale.dtype))",
        "ranks.gather_rows(lse.to(scale.dtype)).flip(0)",
        LOSS_RANKS + "[contract-what=generalized_lse-2]",
    ),
]

ALIGNMENT_FILE = "fastcl/losses/alignment.py"
GENERALIZED_FILE = "fastcl/losses/generalized.py"
DECOUPLED_FILE = "fastcl/losses/decoupled.py"
COMPOSED = [
    Mutant(
        "distance from the cosine",
        ALIGNMENT_FILE,
        "square = (z1 - z2).square().sum(1)",
        "square = 2 - 2 * (z1 * z2).sum(1)",
        LOSSES + "test_alignment_of_close_views[True]",
    ),
    Mutant(
        "pairs counted with self",
        ALIGNMENT_FILE,
        "math.log(batch.total - 1)",
        "math.log(batch.total)",
        LOSSES + "test_shapes[chunked-uniformity-17-33-dtype1]",
    ),
    Mutant(
        "distances from the origin",
        ALIGNMENT_FILE,
        "z = z - middle / batch.total",
        "z = z - 0 * middle",
        LOSSES + "test_uniformity_far_from_the_origin[chunked-dtype1]",
    ),
    Mutant(
        "every rank about a mean of its own",
        ALIGNMENT_FILE,
        "middle = batch.ranks.sum(middle)",
        "middle = middle * 1",
        LOSS_RANKS + "[contract-what=uniformity_of_lengths-2]",
    ),
    Mutant(
        "bound of uniformity too small",
        ALIGNMENT_FILE,
        "bound = 2 * t if normalize",
        "bound = 0.1 if normalize",
        LOSSES + "test_widths_of_uniformity[triton-True-50.0-dtype1]",
    ),
    Mutant(
        "one row has a uniformity",
        ALIGNMENT_FILE,
        ", least=2",
        "",
        LOSS_INPUTS + "test_refused_by_name[uniformity_loss one row]",
    ),
    Mutant(
        "t may differ over ranks",
        ALIGNMENT_FILE,
        '"t": t, ',
        "",
        LOSS_RANKS + "[all_ranks_raise-function=uniformity_loss-2]",
    ),
    Mutant(
        "weight of the log-sum-exp ignored",
        DECOUPLED_FILE,
        "weight=weight, pull=1.0",
        "weight=1.0, pull=1.0",
        LOSSES + "test_shapes[chunked-decoupled-17-33-dtype1]",
    ),
    Mutant(
        "weight may differ over ranks",
        DECOUPLED_FILE,
        'settings={"weight": weight}',
        "settings={}",
        LOSS_RANKS + "[all_ranks_raise-function=decoupled_nt_xent-2]",
    ),
    Mutant(
        "self left out of the published sum",
        GENERALIZED_FILE,
        "torch.logaddexp(others, scale * rows.square().sum(1).double())",
        "others",
        LOSSES + "test_shapes[chunked-lse-17-33-dtype1]",
    ),
    Mutant(
        "log D dropped",
        GENERALIZED_FILE,
        " - math.log(z.shape[1])",
        " - 0.0",
        LOSSES + "test_shapes[chunked-lse-17-33-dtype1]",
    ),
    Mutant(
        "alignment not halved",
        GENERALIZED_FILE,
        "/ (2 * z1.shape[1])",
        "/ z1.shape[1]",
        LOSSES + "test_weights_of_the_generalised_loss[chunked-swd-0.0-1]",
    ),
    Mutant(
        "loss_scale for the alignment alone",
        GENERALIZED_FILE,
        "loss_scale * (aligned + weight * spread)",
        "loss_scale * aligned + weight * spread",
        LOSSES + "test_weights_of_the_generalised_loss[chunked-swd-5-1000.0]",
    ),
    Mutant(
        "sliced distance summed",
        GENERALIZED_FILE,
        'spread / batch.total if reduction == "mean"',
        'spread if reduction == "mean"',
        LOSSES + "test_shapes[chunked-swd-17-33-dtype1]",
    ),
    Mutant(
        "lse takes any prior",
        GENERALIZED_FILE,
        'if distribution == "lse" and',
        "if False and",
        LOSS_INPUTS + "test_refused_by_name[generalized_contrastive_loss lse normal]",
    ),
    Mutant(
        "both views counted as one",
        "fastcl/losses/batch.py",
        'None, views * x.shape[0], ""',
        'None, x.shape[0], ""',
        LOSSES + "test_shapes[chunked-alignment-17-33-dtype1]",
    ),
    Mutant(
        "modules show what is the default",
        "fastcl/losses/module.py",
        "if value != self._defaults[key]",
        "if value == self._defaults[key]",
        MODULE + "test_every_module_shows_its_settings",
    ),
]
