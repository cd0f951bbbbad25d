"""Mutants of the losses of rows against other rows and of labels, of memories and statistics."""

from __future__ import annotations

import pairs_ops
from mutant import PAIR_LOSSES, PAIR_RANKS, Mutant

EXTREMES = "tests/test_pair_extremes.py::"
GOOD_INPUTS = "tests/test_pair_good_inputs.py::"
MEMORY_TEST, STATS_TEST = "tests/test_memory.py::", "tests/test_stats.py::"
SHAPES = PAIR_LOSSES + "test_shapes[chunked-"

INFO_NCE_FILE = "fastcl/losses/info_nce.py"
INFO_NCE = [
    Mutant(
        "log_q not taken off the positive",
        INFO_NCE_FILE,
        "positive if bias is None else positive + bias",
        "positive",
        PAIR_LOSSES + "test_bias_of_sampling",
    ),
    Mutant(
        "log_q added",
        INFO_NCE_FILE,
        "-log_q.detach().to(scale)",
        "log_q.detach().to(scale)",
        PAIR_LOSSES + "test_bias_of_sampling",
    ),
    Mutant(
        "ids ignored",
        INFO_NCE_FILE,
        "ids = None if ids is None else ids.long().contiguous()",
        "ids = None",
        PAIR_LOSSES + "test_masked_duplicates[dtype0]",
    ),
    Mutant(
        "the batch beside a queue by default",
        INFO_NCE_FILE,
        "within = in_batch or (in_batch is None and negatives is None)",
        "within = in_batch is not False",
        SHAPES + "queue_nce-2-5-dtype0]",
    ),
    Mutant(
        "queue rounded to the type of the queries",
        INFO_NCE_FILE,
        "torch.promote_types(query.dtype, negatives.dtype)",
        "query.dtype",
        PAIR_LOSSES + "test_queue_of_another_dtype[chunked-queue_nce-dtype3]",
    ),
    Mutant(
        "queue normalised in fewer digits than the queries",
        INFO_NCE_FILE,
        "torch.promote_types(query.dtype, negatives.dtype)",
        "negatives.dtype",
        PAIR_LOSSES + "test_queue_of_another_dtype[chunked-queue_nce-dtype0]",
    ),
]

CLIP_FILE, SIGLIP_FILE = "fastcl/losses/clip.py", "fastcl/losses/siglip.py"
IMAGES = [
    Mutant(
        "mean over images alone",
        CLIP_FILE,
        "batch._replace(total=2 * batch.total)",
        "batch",
        SHAPES + "clip-2-5-dtype0]",
    ),
    Mutant(
        "texts first",
        CLIP_FILE,
        "torch.cat([per_image - positive, per_text - positive])",
        "torch.cat([per_text - positive, per_image - positive])",
        PAIR_LOSSES + "test_clip_is_info_nce_in_both_directions",
    ),
    Mutant(
        "range of lengths known from the scale",
        "fastcl/losses/batch.py",
        "    if not normalize:\n",
        "    if not normalize and isinstance(logit_scale, Tensor):\n",
        PAIR_LOSSES + "test_numbers_and_tensors_agree_on_long_rows[cpp-clip]",
    ),
    Mutant(
        "the same from the temperature",
        "fastcl/losses/batch.py",
        "Tensor) else temperature, normalize)",
        "Tensor) else temperature, normalize or not isinstance(temperature, Tensor))",
        PAIR_LOSSES + "test_numbers_and_tensors_agree_on_long_rows[cpp-batch_nce]",
    ),
    Mutant(
        "positive questions answered with no",
        SIGLIP_FILE,
        "softplus(-(scale.double()",
        "softplus((scale.double()",
        SHAPES + "siglip-2-5-dtype0]",
    ),
    Mutant(
        "no gradient of the bias from positives",
        SIGLIP_FILE,
        "+ bias.double()))",
        "+ bias.detach().double()))",
        SHAPES + "siglip-2-5-dtype0]",
    ),
    Mutant(
        "mean over this rank's images",
        SIGLIP_FILE,
        "total / batch.total if reduction",
        "total / len(x) if reduction",
        PAIR_RANKS + "[contract-family=siglip-2]",
    ),
    Mutant(
        "bias may differ over ranks",
        SIGLIP_FILE,
        '"logit_bias": setting_of(logit_bias), ',
        "",
        PAIR_RANKS + "[all_ranks_raise-what=siglip_loss-2]",
    ),
]

POSITIVES_FILE, INSTANCE_FILE = "fastcl/losses/positives.py", "fastcl/losses/instance_discrimination.py"
NOISE_FILE = "fastcl/losses/noise.py"
LABELS = [
    Mutant(
        "sum of the positives' exponentials, not their mean",
        POSITIVES_FILE,
        "rows = rows + counts.clamp(min=1).double().log()",
        "rows = rows + 0 * counts",
        SHAPES + "supcon_in-65-33-dtype0]",
    ),
    Mutant(
        "form ignored",
        POSITIVES_FILE,
        'if form == "in":',
        "if False:",
        SHAPES + "supcon_in-65-33-dtype0]",
    ),
    Mutant(
        "rows without a positive have a loss",
        POSITIVES_FILE,
        "torch.where(has, everything, 0.0)",
        "everything",
        PAIR_LOSSES + "test_supcon_counts_anchors_with_a_positive",
    ),
    Mutant(
        "NaN gradients without a positive",
        POSITIVES_FILE,
        'softplus(torch.where(has, lse("drop") - lse("only"), -torch.inf))',
        'torch.where(has, softplus(lse("drop") - lse("only")), 0.0)',
        EXTREMES + "test_one_row[chunked-supcon_in-dtype1]",
    ),
    Mutant(
        "self counted as a positive",
        POSITIVES_FILE,
        "torch.searchsorted(ordered, ids) - 1",
        "torch.searchsorted(ordered, ids)",
        SHAPES + "supcon_in-65-33-dtype0]",
    ),
    Mutant(
        "mean over this rank's anchors",
        POSITIVES_FILE,
        "anchors = batch.ranks.sum(anchors)",
        "anchors = anchors * 1",
        PAIR_RANKS + "[contract-family=supcon-2]",
    ),
    Mutant(
        "images of ranks taken for the same",
        "fastcl/losses/views.py",
        "batch.ranks.first_row // count",
        "0 * batch.ranks.first_row",
        PAIR_RANKS + "[contract-family=three-2]",
    ),
    Mutant(
        "positive back in the sum of DCL",
        "fastcl/losses/dcl.py",
        "positive_counts=False,",
        "positive_counts=True,",
        SHAPES + "dcl-2-5-dtype0]",
    ),
    Mutant(
        "log(n / m) missing",
        NOISE_FILE,
        "beta = math.log(instances / len(noise)) - log_z",
        "beta = 0.0 - log_z",
        SHAPES + "noise-2-5-dtype0]",
    ),
    Mutant(
        "normaliser of this rank's queries",
        NOISE_FILE,
        "math.log(batch.total * len(noise))",
        "math.log(len(q) * len(noise))",
        PAIR_RANKS + "[contract-family=instances-2]",
    ),
    Mutant(
        "noise of its own on every rank",
        INSTANCE_FILE,
        "manual_seed(batch.ranks.seed)",
        "manual_seed(batch.ranks.seed + batch.ranks.rank)",
        PAIR_RANKS + "[contract-family=instances-2]",
    ),
    Mutant(
        "gradient of the bank",
        INSTANCE_FILE,
        "indices.long(), bank.detach()",
        "indices.long(), bank",
        GOOD_INPUTS + "test_what_is_constant_gets_no_gradient",
    ),
    Mutant(
        "labels in the constructor",
        "fastcl/losses/module.py",
        "if key not in per_call)",
        "if True)",
        "tests/test_pair_modules.py::test_message_of_an_unknown_keyword",
    ),
    Mutant(
        "infinite bias taken",
        "fastcl/losses/checks.py",
        "if not abs(value) <= LARGEST:",
        "if abs(value) != abs(value):",
        "tests/test_pair_inputs.py::test_refused_by_name[siglip_loss logit_bias inf]",
    ),
]

MEMORY_FILE, STATS_FILE = "fastcl/memory.py", "fastcl/stats.py"
MEMORIES = [
    Mutant(
        "queue never wraps around",
        MEMORY_FILE,
        "self.position = (self.position + len(keys)) % size",
        "self.position = (self.position + len(keys)).clamp(max=size - 1)",
        MEMORY_TEST + "test_queue_is_circular[3]",
    ),
    Mutant(
        "keys in the wrong order",
        MEMORY_FILE,
        "self.rows.index_copy(0, places, keys)",
        "self.rows.index_copy(0, places, keys.flip(0))",
        MEMORY_TEST + "test_queue_is_circular[3]",
    ),
    Mutant(
        "keys of all ranks may be more than the queue",
        MEMORY_FILE,
        "if batch.total > size:",
        "if len(keys) > size:",
        PAIR_RANKS + "[all_ranks_raise-what=Queue.enqueue-2]",
    ),
    Mutant(
        "queue changed in place",
        MEMORY_FILE,
        "self.rows = self.rows.index_copy(0, places, keys)",
        "self.rows.index_copy_(0, places, keys)",
        MEMORY_TEST + "test_enqueue_between_forward_and_backward",
    ),
    Mutant(
        "queue of this rank's keys",
        MEMORY_FILE,
        "keys = _gathered(batch, ops.unit_rows(keys, None)[0].to(self.rows.dtype))",
        "keys = ops.unit_rows(keys, None)[0].to(self.rows.dtype)",
        PAIR_RANKS + "[queue-2]",
    ),
    Mutant(
        "position not in the state",
        MEMORY_FILE,
        'self.register_buffer("position", torch.zeros((), dtype=torch.int64))',
        'self.register_buffer("position", torch.zeros((), dtype=torch.int64), persistent=False)',
        MEMORY_TEST + "test_queue_state",
    ),
    Mutant(
        "momentum of the feature",
        MEMORY_FILE,
        "self.momentum * old + (1 - self.momentum) * found[last]",
        "(1 - self.momentum) * old + self.momentum * found[last]",
        MEMORY_TEST + "test_bank_moves_rows[dtype1-0.25]",
    ),
    Mutant(
        "not the last of an instance",
        MEMORY_FILE,
        'where, order, "amax")',
        'where, order, "amin")',
        MEMORY_TEST + "test_bank_takes_the_last_of_an_instance[2]",
    ),
    Mutant(
        "mixed rows not of unit length",
        MEMORY_FILE,
        "found[last], None)[0].to(old.dtype)",
        "found[last], None)[0].to(old.dtype) * 1.5",
        MEMORY_TEST + "test_bank_moves_rows[dtype1-0.25]",
    ),
    Mutant(
        "log Z of every call",
        MEMORY_FILE,
        "self.log_z if self._estimated else None",
        "None",
        "tests/test_pair_modules.py::test_instances_equal_the_function[4]",
    ),
    Mutant(
        "log Z of an evaluation kept",
        MEMORY_FILE,
        "        if self.training:\n            if log_z is not None and",
        "        if True:\n            if log_z is not None and",
        MEMORY_TEST + "test_normaliser_is_of_training",
    ),
    Mutant(
        "queries of the module normalised whatever it was told",
        INSTANCE_FILE,
        'product_rows(name, query, shared["normalize"])',
        "product_rows(name, query, True)",
        MEMORY_TEST + "test_normaliser_is_that_of_the_first_call[False]",
    ),
    Mutant(
        "the easiest negatives",
        MEMORY_FILE,
        "descending=True",
        "descending=False",
        MEMORY_TEST + "test_narrow_takes_the_nearest[dtype1-True]",
    ),
    Mutant(
        "width of the ranks ignored",
        MEMORY_FILE,
        "(width * x.abs())",
        "(x.abs())",
        MEMORY_TEST + "test_ranks_follow_the_skew_normal_law[0.05-None]",
    ),
    Mutant(
        "nearest by the angle alone",
        MEMORY_FILE,
        "product_rows(name, x.detach(), normalize)",
        "product_rows(name, x.detach(), True)",
        MEMORY_TEST + "test_narrow_takes_the_nearest[dtype1-False]",
    ),
    Mutant(
        "roundings decide between ties",
        STATS_FILE,
        "(scale * (positive - rounding) > nearest)",
        "(scale * positive > nearest)",
        STATS_TEST + "test_collapsed_rows_find_nothing[chunked-0.1-True-dtype1]",
    ),
    Mutant(
        "positives among the negatives",
        STATS_FILE,
        "own = z.double().square().sum() + positive.sum()",
        "own = z.double().square().sum()",
        STATS_TEST + "test_what_they_say[chunked]",
    ),
    Mutant(
        "entropy without the positive",
        STATS_FILE,
        "expected = share * mean + (1 - share) * scale * positive",
        "expected = share * mean",
        STATS_TEST + "test_what_they_say[chunked]",
    ),
    Mutant(
        "uniformity of this rank's rows",
        STATS_FILE,
        "apart = ranks.logsumexp(apart)",
        "apart = apart * 1",
        PAIR_RANKS + "[stats-2]",
    ),
]

MUTANTS = [*pairs_ops.MUTANTS, *INFO_NCE, *IMAGES, *LABELS, *MEMORIES]
