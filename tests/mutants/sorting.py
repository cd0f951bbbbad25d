"""Mutants of the sorts and of the sliced Wasserstein distance; those of C++ are NATIVE, ordered by file."""

from __future__ import annotations

from mutant import DRAWS, SORT, SWD, SWD_INPUTS, WASSERSTEIN, Mutant

CHUNKED_FILE = "fastcl/ops/chunked.py"
CHUNKED = [
    Mutant(
        "always ascending",
        CHUNKED_FILE,
        "dim=1, descending=descending, stable=True)",
        "dim=1, descending=False, stable=True)",
        SORT + "test_small[chunked-normal-float32-True]",
    ),
    Mutant(
        "equal projections in reverse order of the rows",
        CHUNKED_FILE,
        "        ordered, place = torch.sort(x[rows], dim=1, stable=True)\n",
        "        place = m - 1 - torch.sort(x[rows].flip(1), dim=1, stable=True).indices\n"
        "        ordered = x[rows].gather(1, place)\n",
        WASSERSTEIN + "test_ties_take_the_order_of_the_rows[chunked-few values-40-40-float32]",
    ),
    Mutant(
        "a cell of y may reach beyond that of x",
        CHUNKED_FILE,
        "torch.minimum(row + k, (column + 1) * m)",
        "(column + 1) * m",
        WASSERSTEIN + "test_other_numbers[chunked-5-4-float32]",
    ),
    Mutant(
        "last of the cells that a row meets lost",
        CHUNKED_FILE,
        "else k // m + 2",
        "else k // m + 1",
        WASSERSTEIN + "test_other_numbers[chunked-5-4-float32]",
    ),
    Mutant(
        "infinity times an overlap of no width",
        CHUNKED_FILE,
        "torch.where(weight > 0, ordered[:, :, None] - other, 0.0)",
        "ordered[:, :, None] - other",
        WASSERSTEIN + "test_infinity[chunked-40-60-inf-x-float32]",
    ),
    Mutant(
        "gradient of half the square",
        CHUNKED_FILE,
        "2 * slope.sum(2)",
        "slope.sum(2)",
        WASSERSTEIN + "test_as_many_on_both_sides[chunked-7-float32]",
    ),
    Mutant(
        "gradients in order of rank",
        CHUNKED_FILE,
        "grad[rows].scatter_(1, place, 2 * slope.sum(2))",
        "grad[rows] = 2 * slope.sum(2)",
        WASSERSTEIN + "test_as_many_on_both_sides[chunked-7-float32]",
    ),
    Mutant(
        "shares in order of rank",
        CHUNKED_FILE,
        "cost[rows].scatter_(1, place, share)",
        "cost[rows] = share",
        WASSERSTEIN + "test_as_many_on_both_sides[chunked-7-float32]",
    ),
    Mutant(
        "later chunks meet the first chunk's samples",
        CHUNKED_FILE,
        "torch.sort(y[rows], dim=1)",
        "torch.sort(y[: len(ordered)], dim=1)",
        WASSERSTEIN + "test_chunk_boundaries[23-23-float32]",
    ),
]

SORTING_FILE = "fastcl/ops/sorting.py"
FUNCTIONS = [
    Mutant(
        "gradient of the sort gathered, not scattered",
        SORTING_FILE,
        "torch.zeros_like(grad).scatter(1, indices.long(), grad)",
        "grad.gather(1, indices.long())",
        SORT + "test_gradient_goes_where_values_came_from[chunked]",
    ),
    Mutant(
        "sum over the projections, not the mean",
        SORTING_FILE,
        "ctx.factor = x.shape[1] / count",
        "ctx.factor = x.shape[1]",
        SWD + "test_priors[chunked-normal-3-64-float32]",
    ),
    Mutant(
        "weights of rows averaged",
        SORTING_FILE,
        ".mul_(weight[:, None])",
        ".mul_(weight.mean())",
        SWD + "test_reductions[chunked-none-False-float32]",
    ),
    Mutant(
        "gradient in the dtype of autocast",
        SORTING_FILE,
        "with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):",
        "with torch.no_grad():",
        SWD + "test_autocast[normal-torch.float32]",
    ),
    Mutant(
        "double backward of the projections gives zeros",
        SORTING_FILE,
        "(dz,) = refuse_double_backward(ctx.name, rows, (grad_loss,), dz)",
        "(dz,) = (dz.detach().requires_grad_(),)",
        SWD + "test_double_backward_is_refused[chunked-{'normalize': False}]",
    ),
]

LOSS_FILE = "fastcl/losses/swd.py"
LOSS = [
    Mutant(
        "given samples normalise the rows",
        LOSS_FILE,
        'return self.prior_samples is None and self.prior == "hypersphere"',
        'return self.prior == "hypersphere"',
        SWD + "test_normalize_follows_the_prior[chunked]",
    ),
    Mutant(
        "number of projections ignored",
        LOSS_FILE,
        "draws.orthogonal_projections(self.num_projections or d,",
        "draws.orthogonal_projections(d,",
        SWD + "test_what_is_drawn[chunked-normal-5-float32]",
    ),
    Mutant(
        "samples drawn from the global generator",
        LOSS_FILE,
        "draws.prior_samples(self.prior, batch.total, d, z, generator)",
        "draws.prior_samples(self.prior, batch.total, d, z, None)",
        SWD + "test_seeds[chunked]",
    ),
    Mutant(
        "samples take part in autograd",
        LOSS_FILE,
        "samples.detach().to(z.dtype)",
        "samples.to(z.dtype)",
        SWD + "test_samples_and_directions_of_any_dtype[chunked]",
    ),
    Mutant(
        "sum in place of the mean",
        LOSS_FILE,
        'rows / batch.total if reduction == "mean" else rows',
        "rows",
        SWD + "test_reductions[chunked-mean-False-float32]",
    ),
    Mutant(
        "more samples than indices can number pass",
        LOSS_FILE,
        'checks.sortable(name, "prior_samples", self.prior_samples.shape[0])',
        "pass",
        SWD_INPUTS + "test_refused_by_name[2^31 samples]",
    ),
    Mutant(
        "number of projections beside projections passes",
        LOSS_FILE,
        "            if self.projections is not None:\n",
        "            if self.projections is None:\n",
        SWD_INPUTS + "test_refused_by_name[num_projections 1 and projections]",
    ),
    Mutant(
        "generator on another device passes",
        LOSS_FILE,
        "checks.random_generator(name, self.generator, z.device)",
        "checks.random_generator(name, self.generator, None)",
        SWD_INPUTS + "test_generator_elsewhere",
    ),
    Mutant(
        "module takes any prior",
        LOSS_FILE,
        'draws.check_prior("SWDLoss", prior)',
        "pass",
        SWD_INPUTS + "test_module_refuses_when_constructed[prior 'gaussian']",
    ),
]

DRAWS_FILE = "fastcl/losses/draws.py"
RANDOM = [
    Mutant(
        "hypercube of half the width",
        DRAWS_FILE,
        "samples.uniform_(-1, 1, generator",
        "samples.uniform_(-0.5, 0.5, generator",
        DRAWS + "test_priors[2-torch.float32]",
    ),
    Mutant(
        "samples of the hypersphere not on it",
        DRAWS_FILE,
        'if prior == "hypersphere":',
        'if prior == "sphere":',
        DRAWS + "test_priors[2-torch.float32]",
    ),
    Mutant(
        "signs of the directions dropped",
        DRAWS_FILE,
        "q * -length.sign()[:, None, :]",
        "-q",
        DRAWS + "test_directions_are_uniform[3]",
    ),
    Mutant(
        "reflectors of whole columns",
        DRAWS_FILE,
        ".tril()\n",
        "\n",
        DRAWS + "test_directions_are_uniform[3]",
    ),
    Mutant(
        "reflectors of twice their strength",
        DRAWS_FILE,
        "torch.diag_embed(gram.diagonal(dim1=1, dim2=2) / 2)",
        "torch.diag_embed(gram.diagonal(dim1=1, dim2=2))",
        DRAWS + "test_blocks_are_orthonormal[8]",
    ),
    Mutant(
        "later blocks repeat the first",
        DRAWS_FILE,
        ".tril()\n",
        ".tril()[:1].expand(blocks, -1, -1)\n",
        DRAWS + "test_blocks_are_independent",
    ),
    Mutant(
        "reduced precision of products shows in the angles",
        DRAWS_FILE,
        "if _float32_is_exact() else torch.float64",
        "if _float32_is_exact() else like.dtype",
        DRAWS + "test_reduced_precision_of_products_does_not_show[medium]",
    ),
]

CHECKS_FILE = "fastcl/losses/checks.py"
CHECKS = [
    Mutant(
        "no samples at all pass",
        CHECKS_FILE,
        "if x.shape[0] == 0 or x.shape[1] != z.shape[1]:",
        "if x.shape[1] != z.shape[1]:",
        SWD_INPUTS + "test_refused_by_name[prior_samples empty]",
    ),
    Mutant(
        "True is a number of projections",
        CHECKS_FILE,
        "if isinstance(value, bool) or not isinstance(value, int):",
        "if not isinstance(value, int):",
        SWD_INPUTS + "test_refused_by_name[num_projections True]",
    ),
    Mutant(
        "one element more than indices can number passes",
        CHECKS_FILE,
        "if length >= 2**31:",
        "if length > 2**31:",
        SWD_INPUTS + "test_sort_refuses_by_name[2^31 elements]",
    ),
    Mutant(
        "any value of descending passes",
        "fastcl/sort.py",
        '    checks.flag(name, "descending", descending)\n',
        "",
        SWD_INPUTS + "test_sort_refuses_by_name[descending=1]",
    ),
]

RADIX_FILE = "csrc/cpu/radix_sort.h"
SORT_FILE = "csrc/cpu/segmented_sort.cpp"
WASSERSTEIN_FILE = "csrc/cpu/wasserstein_1d.cpp"
NATIVE = [
    Mutant(
        "C++: -0 comes before +0",
        RADIX_FILE,
        "static_cast<Key>(negate_if(sign, magnitude) + kSignBit<Key>)",
        "static_cast<Key>(negate_if(sign, magnitude) + kSignBit<Key> - sign)",
        SORT + "test_small[cpp-zeros of both signs-float32-False]",
    ),
    Mutant(
        "C++: NaN by its bits",
        RADIX_FILE,
        "magnitude > FloatBits<T>::kInfinity ? static_cast<Key>(~Key{0}) : key",
        "key",
        SORT + "test_small[cpp-special-float32-False]",
    ),
    Mutant(
        "C++: signs lost on the way back from keys",
        RADIX_FILE,
        "negate_if(sign, signed_magnitude) | sign_bit;",
        "negate_if(sign, signed_magnitude) | (sign_bit & 0);",
        WASSERSTEIN + "test_as_many_on_both_sides[cpp-255-float32]",
    ),
    Mutant(
        "C++: highest digit lost",
        RADIX_FILE,
        "(key_bits + digit_bits - 1) / digit_bits",
        "key_bits / digit_bits",
        SORT + "test_large[cpp-bits-float32-False]",
    ),
    Mutant(
        "C++: digits that most keys share passed over",
        RADIX_FILE,
        "uint32_t{count_of(d, keys[0]) != n} << d",
        "uint32_t{count_of(d, keys[0]) < n / 4} << d",
        SORT + "test_large[cpp-special-float32-False]",
    ),
    Mutant(
        "C++: passes read what an earlier one left",
        RADIX_FILE,
        "    std::swap(from, to);\n",
        "",
        SORT + "test_large[cpp-bits-float64-False]",
    ),
    Mutant(
        "C++: equal elements of short rows reversed",
        RADIX_FILE,
        "keys[j] > key;",
        "keys[j] >= key;",
        SORT + "test_small[cpp-ties-float32-False]",
    ),
    Mutant(
        "C++: always ascending",
        SORT_FILE,
        "to_key(row[i]) ^ flip)",
        "to_key(row[i]) ^ (flip & 0))",
        SORT + "test_small[cpp-normal-float32-True]",
    ),
    Mutant(
        "C++: values made from keys",
        SORT_FILE,
        "to_values[rank] = row[item.index];",
        "to_values[rank] = from_key<T>(item.key ^ flip);",
        SORT + "test_small[cpp-special-float32-False]",
    ),
    Mutant(
        "C++: infinity of fp16 is a NaN",
        SORT_FILE,
        "kInfinity = 0x7C00;",
        "kInfinity = 0x7BFF;",
        SORT + "test_small[cpp-special-float16-False]",
    ),
    Mutant(
        "C++: largest number of bf16 is an infinity",
        SORT_FILE,
        "kInfinity = 0x7F80;",
        "kInfinity = 0x7F7E;",
        SORT + "test_small[cpp-special-bfloat16-True]",
    ),
    Mutant(
        "C++: gradient of half the square",
        WASSERSTEIN_FILE,
        "sums.difference * (2 * scale)",
        "sums.difference * scale",
        WASSERSTEIN + "test_as_many_on_both_sides[cpp-7-float32]",
    ),
    Mutant(
        "C++: gradients in order of rank",
        WASSERSTEIN_FILE,
        "grad[item.index] =",
        "grad[rank] =",
        WASSERSTEIN + "test_as_many_on_both_sides[cpp-7-float32]",
    ),
    Mutant(
        "C++: shares in order of rank",
        WASSERSTEIN_FILE,
        "terms[item.index] =",
        "terms[rank] =",
        WASSERSTEIN + "test_as_many_on_both_sides[cpp-7-float32]",
    ),
    Mutant(
        "C++: a cell of y may reach beyond that of x",
        WASSERSTEIN_FILE,
        "std::min((j + 1) * m, end)",
        "(j + 1) * m",
        WASSERSTEIN + "test_other_numbers[cpp-5-4-float32]",
    ),
    Mutant(
        "C++: costs added up in float32",
        WASSERSTEIN_FILE,
        "double total = 0;",
        "float total = 0;",
        WASSERSTEIN + "test_as_many_on_both_sides[cpp-16385-float32]",
    ),
    Mutant(
        "C++: every projection meets the first one's samples",
        WASSERSTEIN_FILE,
        "p_y + p * k",
        "p_y + 0 * p * k",
        WASSERSTEIN + "test_as_many_on_both_sides[cpp-7-float32]",
    ),
]

MUTANTS = [*CHUNKED, *FUNCTIONS, *LOSS, *RANDOM, *CHECKS]
