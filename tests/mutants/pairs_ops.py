"""Mutants of chunked torch and of the autograd.Functions over rows and other rows, ids, softplus, over ranks too."""

from __future__ import annotations

from mutant import PAIR_LOSSES, PAIR_OPS, PAIR_RANKS, Mutant

RECTANGLE = PAIR_OPS + "test_lse_of_rectangles"
EXTREMES = "tests/test_pair_extremes.py::"
LOG_Q_RANKS = PAIR_RANKS + "[contract-family=info_nce-2]"

CHUNKED_FILE = "fastcl/ops/chunked.py"
CHUNKED = [
    Mutant(
        "sums of columns not brought to the next chunk's maximum",
        CHUNKED_FILE,
        "self.sums *= (_shift(self.peak) - _shift(peak)).double().exp()",
        "self.sums *= 1",
        PAIR_LOSSES + "test_chunk_boundaries",
    ),
    Mutant(
        "bias in the positives",
        CHUNKED_FILE,
        "torch.where(equal, S if bias is None else S - bias, 0.0)",
        "torch.where(equal, S, 0.0)",
        RECTANGLE + "[chunked-3-5-4-sum-True-dtype0]",
    ),
    Mutant(
        "scale left in the positives",
        CHUNKED_FILE,
        "products.sum(1, dtype=torch.float64) / scale",
        "products.sum(1, dtype=torch.float64)",
        RECTANGLE + "[chunked-3-5-4-sum-False-dtype0]",
    ),
    Mutant(
        "pairs left out are positives",
        CHUNKED_FILE,
        "return equal.logical_and_(S != -torch.inf)",
        "return equal",
        PAIR_OPS + "test_lse_of_the_rows_themselves[chunked-18-9-sum-False-dtype0]",
    ),
    Mutant(
        "only the same id became no other id",
        CHUNKED_FILE,
        "S.masked_fill_(~equal, -torch.inf)",
        "S.masked_fill_(equal, -torch.inf)",
        RECTANGLE + "[chunked-3-5-4-only-False-dtype0]",
    ),
    Mutant(
        "pairs of the same id pushed",
        CHUNKED_FILE,
        "weights -= torch.where(equal, pull, 0.0)",
        "weights += torch.where(equal, pull, 0.0)",
        RECTANGLE + "[chunked-3-5-4-sum-False-dtype0]",
    ),
    Mutant(
        "softplus by the plain logarithm of torch",
        CHUNKED_FILE,
        ".exp_().log1p_())",
        ".exp_().add_(1).log_())",
        PAIR_OPS + "test_softplus_is_relatively_exact[chunked--30.0-dtype0]",
    ),
    Mutant(
        "pairs left out of a negative softplus count",
        CHUNKED_FILE,
        "torch.where(S == -torch.inf, S, -S)",
        "-S",
        PAIR_OPS + "test_softplus[chunked-3-5-4-keep--1.0-dtype0]",
    ),
    Mutant(
        "rows without pairs have no mean",
        CHUNKED_FILE,
        "torch.where(sums == 0, 0.0, weighted / sums)",
        "weighted / sums",
        PAIR_OPS + "test_stats[chunked-1-1-1-0.5-dtype0]",
    ),
]

PAIRS_FILE = "fastcl/ops/pairs.py"
PAIRS = [
    Mutant(
        "a row of the queue taken for the key",
        PAIRS_FILE,
        "ctx.first - block.first if ctx.diagonal else block.rows.shape[0]",
        "ctx.first - block.first",
        PAIR_LOSSES + "test_shapes[chunked-queue_nce-2-5-dtype0]",
    ),
    Mutant(
        "every rank's columns taken for the first's",
        PAIRS_FILE,
        "[ctx.first : ctx.first + b.shape[0]]",
        "[: b.shape[0]]",
        PAIR_RANKS + "[contract-family=clip-2]",
    ),
    Mutant(
        "upstream weights of the rows on the columns",
        PAIRS_FILE,
        "block.of(every_lse[1]), w[0], block.of(every_w[1])",
        "block.of(every_lse[1]), w[0], block.of(every_w[0])",
        PAIR_LOSSES + "test_every_reduction[chunked-clip-dtype1-True]",
    ),
    Mutant(
        "upstream gradient missing in that of the scale",
        PAIRS_FILE,
        "d_scale = (peak * (a.to(",
        "d_scale = (1.0 * (a.to(",
        PAIR_LOSSES + "test_shapes[chunked-batch_nce-2-5-dtype0]",
    ),
    Mutant(
        "offset not negated where ranks swap roles",
        PAIRS_FILE,
        "offset = block.first - ctx.first if",
        "offset = ctx.first - block.first if",
        LOG_Q_RANKS,
    ),
    Mutant(
        "ids of the wrong rows gathered",
        PAIRS_FILE,
        "ctx.ranks.gather_rows(ids_a)",
        "ctx.ranks.gather_rows(ids_a).flip(0)",
        LOG_Q_RANKS,
    ),
    Mutant(
        "self not left out of the columns' gradient over ranks",
        PAIRS_FILE,
        "b, block.rows, scale, ctx.bound, _offset(ctx, block)",
        "b, block.rows, scale, ctx.bound, block.rows.shape[0]",
        LOG_Q_RANKS,
    ),
    Mutant(
        "one direction has weights of the columns over ranks",
        PAIRS_FILE,
        "own = lse[1] if ctx.both else lse[0].new_full((b.shape[0],), -torch.inf)",
        "own = lse[-1]",
        LOG_Q_RANKS,
    ),
    Mutant(
        "log-sum-exp of the largest alone over ranks",
        "fastcl/distributed.py",
        "return self.sum((x - shift).exp()).log() + shift",
        "return self.sum((x - shift).exp()).log()",
        PAIR_RANKS + "[contract-family=clip-2]",
    ),
    Mutant(
        "nothing on any rank is NaN",
        "fastcl/distributed.py",
        "shift = torch.where(peak.isfinite(), peak, 0.0)",
        "shift = peak",
        PAIR_RANKS + "[one_image_in_the_world-2]",
    ),
]

SOFTPLUS_FILE = "fastcl/ops/softplus.py"
SOFTPLUS = [
    Mutant(
        "each pair of the same rows counted twice in the gradient of the scale",
        SOFTPLUS_FILE,
        "share = 0.5 if ctx.symmetric else 1.0",
        "share = 1.0",
        PAIR_LOSSES + "test_softplus_of_the_rows_themselves[True-1.0]",
    ),
    Mutant(
        "bias gets no upstream weights",
        SOFTPLUS_FILE,
        "slopes if w is None else w * slopes",
        "slopes",
        PAIR_LOSSES + "test_every_reduction[chunked-siglip-dtype1-True]",
    ),
    Mutant(
        "sign missing in the gradient",
        SOFTPLUS_FILE,
        "factor = (peak * ctx.sign * scale)",
        "factor = (peak * scale)",
        PAIR_LOSSES + "test_softplus_of_the_rows_themselves[True--1.0]",
    ),
    Mutant(
        "columns over ranks have weights of this rank's bias",
        SOFTPLUS_FILE,
        "(None, every_beta, None, every_w)",
        "(None, every_beta, None, None)",
        PAIR_RANKS + "[contract-family=siglip-2]",
    ),
    Mutant(
        "columns over ranks leave out the first rank's rows",
        SOFTPLUS_FILE,
        "ctx.first - block.first if ctx.diagonal else",
        "0 if ctx.diagonal else",
        PAIR_RANKS + "[contract-family=siglip-2]",
    ),
]

SAMPLED_FILE, ROWS_FILE, SIMILARITY_FILE = "fastcl/ops/sampled.py", "fastcl/ops/rows.py", "fastcl/ops/similarity.py"
OTHERS = [
    Mutant(
        "repeated choices count once",
        SAMPLED_FILE,
        ".exp_().mul_(counts).sum(1)",
        ".exp_().sum(1)",
        PAIR_LOSSES + "test_shapes[chunked-hard_nce-2-5-dtype0]",
    ),
    Mutant(
        "repeated choices pull once",
        SAMPLED_FILE,
        "S.sub_(lse[start:stop, None]).exp_().mul_(counts)",
        "S.sub_(lse[start:stop, None]).exp_()",
        PAIR_LOSSES + "test_shapes[chunked-hard_nce-2-5-dtype0]",
    ),
    Mutant(
        "positives missing in the gradient of the temperature",
        ROWS_FILE,
        "d_scale = d_scale + (pulls[0] * positives[0]).sum()",
        "d_scale = d_scale + 0 * positives[0].sum()",
        PAIR_LOSSES + "test_shapes[chunked-supcon-65-33-dtype0]",
    ),
    Mutant(
        "positives push",
        ROWS_FILE,
        "[grad, -grad_sums / scale]",
        "[grad, grad_sums / scale]",
        PAIR_LOSSES + "test_shapes[chunked-supcon-65-33-dtype0]",
    ),
    Mutant(
        "labels of the wrong rows gathered",
        ROWS_FILE,
        "ranks.gather_rows(ids)",
        "ranks.gather_rows(ids).flip(0)",
        PAIR_RANKS + "[contract-family=supcon-2]",
    ),
    Mutant(
        "upstream gradients of the wrong rows gathered",
        SIMILARITY_FILE,
        "ranks.gather_rows(mine)",
        "ranks.gather_rows(mine).flip(0)",
        PAIR_RANKS + "[contract-family=clip-2]",
    ),
    Mutant(
        "nothing to compare a pair with is -infinity",
        CHUNKED_FILE,
        "x.masked_fill(alone, 0.0)",
        "x",
        EXTREMES + "test_one_row[chunked-dcl-dtype1]",
    ),
    Mutant(
        "positive out of the sum pulls as if it were in",
        CHUNKED_FILE,
        "alone.logical_not().double()",
        "x.sigmoid()",
        PAIR_LOSSES + "test_shapes[chunked-dcl-2-5-dtype0]",
    ),
    Mutant(
        "double backward forgets what upstream gradients depend on",
        "fastcl/ops/double_backward.py",
        "_RaiseOnBackward.apply(name, 1 + len(upstream), output, *upstream, *grads)",
        "_RaiseOnBackward.apply(name, 1, output, *grads)",
        "tests/test_pair_contract.py::test_double_backward_is_refused[supcon_in-mean-True]",
    ),
]

MUTANTS = [*CHUNKED, *PAIRS, *SOFTPLUS, *OTHERS]
