"""Mutants of what surrounds the kernels: the autograd.Function, chunked torch, ranks, checks, the module."""

from __future__ import annotations

from composed import COMPOSED, LOSS_RANKS, ROWS
from mutant import INPUTS, MODULE, NT_XENT, RANKS, Mutant

SIMILARITY_FILE = "fastcl/ops/similarity.py"
FUNCTION = [
    Mutant(
        "s missing in the positives of the loss",
        SIMILARITY_FILE,
        "x = lse - scale * pos",
        "x = lse - pos",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "s missing in the gradient",
        SIMILARITY_FILE,
        "pull_grad = lse_grad * scale",
        "pull_grad = lse_grad + 0 * scale",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "positives pulled as if p were 0",
        SIMILARITY_FILE,
        "lse, share = scale * pos + softplus(x), torch.sigmoid(x)",
        "lse, share = scale * pos + softplus(x), torch.ones_like(x)",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "half missing in the temperature gradient",
        SIMILARITY_FILE,
        "0.5 * rowdot",
        "rowdot",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "upstream weights of rows keep their peak",
        SIMILARITY_FILE,
        "grad / peak, None if ranks is None else w_columns / peak",
        "grad, None if ranks is None else w_columns",
        NT_XENT + "test_reductions[chunked-none]",
    ),
    Mutant(
        "double backward gives zeros",
        "fastcl/ops/double_backward.py",
        "if not torch.is_grad_enabled():",
        "if True:",
        INPUTS + "test_double_backward_is_refused[0-mean]",
    ),
    Mutant(
        "log-sum-exps of the wrong rows gathered",
        SIMILARITY_FILE,
        "ranks.gather_rows(lse.to(scale.dtype))",
        "ranks.gather_rows(lse.to(scale.dtype)).flip(0)",
        RANKS + "[contract-reduction=mean-grad_reduction=mean-2]",
    ),
    Mutant(
        "factor W dropped",
        SIMILARITY_FILE,
        "grad * ranks.grad_factor)",
        "grad)",
        RANKS + "[contract-reduction=mean-grad_reduction=mean-2]",
    ),
]

CHUNKED_FILE = "fastcl/ops/chunked.py"
CHUNKED = [
    Mutant(
        "chunk boundary off by one",
        CHUNKED_FILE,
        "start in range(0, rows, step))",
        "start in range(0, rows, step + 1))",
        NT_XENT + "test_chunk_boundaries",
    ),
    Mutant(
        "mask of later chunks at the first rows",
        CHUNKED_FILE,
        "_mask_diagonal(S, start + offset)",
        "_mask_diagonal(S, offset)",
        NT_XENT + "test_chunk_boundaries",
    ),
    Mutant(
        "partners of the second half not left out",
        CHUNKED_FILE,
        "_mask_diagonal(S[middle:], start + middle + offset - pair)",
        "_mask_diagonal(S[middle:], start + middle + offset + pair)",
        NT_XENT + "test_chunk_boundaries",
    ),
    Mutant(
        "later chunks use the first rows' log-sum-exps",
        CHUNKED_FILE,
        ".mul_(u_a[start:stop, None])",
        ".mul_(u_a[: stop - start, None])",
        NT_XENT + "test_chunk_boundaries",
    ),
    Mutant(
        "projection dropped in chunked torch",
        CHUNKED_FILE,
        "(dz - z * (z * dz).sum(1, keepdim=True)) * rnorm",
        "dz * rnorm",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "zero rows get a gradient from chunked torch",
        CHUNKED_FILE,
        "torch.where(norm < EPS, 0.0, 1 / norm)",
        "1 / norm.clamp_min(EPS)",
        INPUTS + "test_zero_rows_get_no_gradient[chunked-float32]",
    ),
]

RANKS_FILE = "fastcl/distributed.py"
DISTRIBUTED = [
    Mutant(
        "padding of shorter ranks not cut",
        RANKS_FILE,
        "part[:count] for part",
        "part for part",
        RANKS + "[contract-reduction=mean-grad_reduction=mean-2]",
    ),
    Mutant(
        "first row as if all ranks were equal",
        RANKS_FILE,
        "return sum(self.counts[: self.rank])",
        "return self.counts[self.rank] * self.rank",
        RANKS + "[contract-reduction=mean-grad_reduction=mean-2]",
    ),
    Mutant(
        "ranks do not hear of another rank's error",
        RANKS_FILE,
        "    if not failed:\n",
        "    if True:\n",
        RANKS + "[all_ranks_raise-what=bad_temperature-2]",
    ),
    Mutant(
        "temperatures may differ over ranks",
        RANKS_FILE,
        "        (slice(3, 5), number_name, _show_number),\n",
        "",
        RANKS + "[all_ranks_raise-what=other_temperature-2]",
    ),
    Mutant(
        "received blocks laid out as columns",
        RANKS_FILE,
        "block.view(mine, count) for",
        "block.view(count, mine).T for",
        LOSS_RANKS + "[contract-what=swd-2]",
    ),
    Mutant(
        "gradients sent back row by row",
        RANKS_FILE,
        "torch.cat([block.flatten() for block in x.split(self.counts, 1)])",
        "x.contiguous().flatten()",
        LOSS_RANKS + "[contract-what=swd-2]",
    ),
    Mutant(
        "every rank projects the samples on the first directions",
        RANKS_FILE,
        "first = sum(shares[: self.rank])",
        "first = 0",
        LOSS_RANKS + "[contract-what=swd-2]",
    ),
    Mutant(
        "factor W of sums of rows dropped",
        RANKS_FILE,
        "return grad * ctx.factor, None",
        "return grad, None",
        LOSS_RANKS + "[contract-what=alignment-2]",
    ),
    Mutant(
        "factor W of the sliced distance dropped",
        "fastcl/ops/sorting.py",
        "weight = weight * ctx.ranks.grad_factor",
        "weight = weight * 1",
        LOSS_RANKS + "[contract-what=swd-2]",
    ),
    Mutant(
        "every rank draws with a seed of its own",
        RANKS_FILE,
        "rows[0][FACTS - 1], ring",
        "rows[dist.get_rank(group)][FACTS - 1], ring",
        LOSS_RANKS + "[draws_are_those_of_rank_0-2]",
    ),
    Mutant(
        "settings may differ over ranks",
        RANKS_FILE,
        "        if other:\n",
        "        if not rows:\n",
        LOSS_RANKS + "[all_ranks_raise-function=swd_loss-2]",
    ),
    Mutant(
        "mean over this rank's rows",
        "fastcl/losses/batch.py",
        "total, where = sum(ranks.counts),",
        "total, where = max(ranks.counts[ranks.rank], 1),",
        RANKS + "[contract-reduction=mean-grad_reduction=mean-2]",
    ),
    Mutant(
        "rows summed on this rank alone",
        "fastcl/losses/batch.py",
        "total = distributed.GlobalSum.apply(total, batch.ranks)",
        "total = total * 1",
        LOSS_RANKS + "[contract-what=alignment-2]",
    ),
]

CHECKS = [
    Mutant(
        "views of different length pass",
        "fastcl/losses/checks.py",
        "if z1.shape != z2.shape:",
        "if z1.shape[1] != z2.shape[1]:",
        INPUTS + "test_refused_by_name[N differs]",
    ),
    Mutant(
        "temperatures are not checked",
        "fastcl/losses/checks.py",
        "if not 0 < value <= sys.float_info.max:",
        "return\n    if False:",
        INPUTS + "test_refused_by_name[temperature -3]",
    ),
    Mutant(
        "learned temperature is its logarithm",
        "fastcl/losses/module.py",
        "self.log_temperature.exp()",
        "-self.log_temperature",
        MODULE + "test_learnable_temperature",
    ),
]

MUTANTS = [*FUNCTION, *CHUNKED, *DISTRIBUTED, *ROWS, *COMPOSED, *CHECKS]
