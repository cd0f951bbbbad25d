"""Mutants of the CUDA kernels, which run on the CPU in the self-test of tests/test_cuda_sources.py."""

from __future__ import annotations

from mutant import Mutant

SELFTEST = "tests/test_cuda_sources.py::test_kernels_on_the_cpu"
# Rows of one warp, and of several.
ONE_WARP, WARPS = SELFTEST + "[33-1]", SELFTEST + "[1025-1024]"

MUTANTS = [
    Mutant(
        "CUDA: NaN in the order of its bits",
        "csrc/cuda/keys.cuh",
        "return magnitude > format.infinity ? format.all_bits() : key;",
        "return magnitude > format.all_bits() ? format.all_bits() : key;",
        ONE_WARP,
    ),
    Mutant(
        "CUDA: overlap beyond the end of a cell",
        "csrc/cuda/cells.cuh",
        "const Int to = (j + 1) * m < end ? (j + 1) * m : end;",
        "const Int to = (j + 1) * m;",
        ONE_WARP,
    ),
    Mutant(
        "CUDA: gradient left at the rank",
        "csrc/cuda/wasserstein_1d.cu",
        "staged[slot[i] & 0xFFFF] =",
        "staged[rank] =",
        ONE_WARP,
    ),
    Mutant(
        "CUDA: descending keys not inverted",
        "csrc/cuda/segmented_sort.cu",
        "return key_of(bits, format) ^ flip;",
        "return key_of(bits, format) ^ (flip & 0);",
        ONE_WARP,
    ),
    Mutant(
        "CUDA: warps do not see each other's counts",
        "csrc/cuda/block_sort.cuh",
        "next += counts;",
        "next += counts & 0;",
        WARPS,
    ),
    Mutant(
        "CUDA: words read before they are there",
        "csrc/cuda/block_sort.cuh",
        "    scatter(word, slot, through);\n    __syncthreads();\n",
        "    scatter(word, slot, through);\n",
        WARPS,
    ),
]
