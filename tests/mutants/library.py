"""Mutants of what surrounds the kernels: the autograd.Function, chunked torch, ranks, checks, the module."""

from __future__ import annotations

from composed import COMPOSED, LOSS_RANKS, ROWS
from mutant import INPUTS, LAUNCHES, MODULE, NT_XENT, RANKS, ROW_KERNELS, Mutant

SIMILARITY_FILE, CHUNKED_FILE = "fastcl/ops/similarity.py", "fastcl/ops/chunked.py"
FUNCTION = [
    Mutant(
        "s missing in the positives of the loss",
        CHUNKED_FILE,
        "x = lse - scale * pos",
        "x = lse - pos",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "s missing in the gradient",
        CHUNKED_FILE,
        "dz = (grad * weight * scale).to(z.dtype)",
        "dz = (grad * weight).to(z.dtype)",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "positives pulled as if p were 0",
        CHUNKED_FILE,
        "rows, share = _softplus(x), x.sigmoid()",
        "rows, share = _softplus(x), torch.ones_like(x)",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "half missing in the temperature gradient",
        CHUNKED_FILE,
        "(0.5 * grad * (z",
        "(grad * (z",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "log-sum-exp of the negatives divides the weights",
        CHUNKED_FILE,
        "whole = scale * pos + rows",
        "whole = lse.clone()",
        NT_XENT + "test_shapes[chunked-17-33-dtype1]",
    ),
    Mutant(
        "the positive depends on the scale although its pull does not",
        CHUNKED_FILE,
        "own = -share if pull is None else 1 - share",
        "own = -share",
        ROW_KERNELS + "test_pair_backward[5-3-True-dtype0-True-0.25-1.0-chunked]",
    ),
    Mutant(
        "mean over ranks of the sums of this rank",
        SIMILARITY_FILE,
        "            loss = ranks.sum(loss).to(scale.dtype)\n",
        "            loss = loss.to(scale.dtype)\n",
        RANKS + "[contract-reduction=mean-grad_reduction=mean-2]",
    ),
    Mutant(
        "a bad temperature on the device gives a number",
        "fastcl/losses/batch.py",
        "return torch.add(scale, scale.detach().log(), alpha=0)",
        "return scale",
        INPUTS + "test_scale_whose_value_nobody_read[-1.0]",
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
        "torch.where(short, 0.0, 1 / norm / peak)",
        "(1 / norm / peak)",
        INPUTS + "test_zero_rows_get_no_gradient[chunked-float32]",
    ),
]

LAUNCHED = [
    Mutant(
        "a copy of the loss is launched",
        "fastcl/losses/two_view.py",
        "    return loss\n",
        "    return loss.clone()\n",
        LAUNCHES + "test_two_view_losses[nt_xent-mean]",
    ),
    Mutant(
        "the scale is copied from the host",
        "fastcl/losses/batch.py",
        "return torch.full((), number, dtype=dtype, device=x.device)",
        "return torch.tensor(number, dtype=dtype).to(x.device)",
        LAUNCHES + "test_nothing_comes_from_the_host[nt_xent-False-mean-dtype1]",
    ),
    Mutant(
        "lengths of unit rows are looked at",
        "fastcl/losses/batch.py",
        "return UNIT_ROWS if isinstance(logit_scale, Tensor)",
        "return ANY_ROWS if isinstance(logit_scale, Tensor)",
        LAUNCHES + "test_learnable_temperature",
    ),
    Mutant(
        "gradients of one chunk are copied",
        "fastcl/kernels/operands.py",
        "if chunk == rows:",
        "if chunk == 0:",
        LAUNCHES + "test_float32",
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

MUTANTS = [*FUNCTION, *LAUNCHED, *CHUNKED, *DISTRIBUTED, *ROWS, *COMPOSED, *CHECKS]
