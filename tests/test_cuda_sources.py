"""The CUDA kernels without a GPU: no spills, no torch headers, shared memory, and their results on the CPU.

The last run the kernels themselves, thread by thread, with the runtime of tests/cuda_emulation.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import cuda_report

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
needs_nvcc = pytest.mark.skipif(cuda_report.NVCC is None, reason="nvcc is not on the path")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the path")


def test_no_torch_headers():
    """So that the kernels compile without torch, and quickly."""
    sources = [*cuda_report.CSRC.glob("*.cu"), *cuda_report.CSRC.glob("*.cuh"), *cuda_report.CSRC.glob("*.h")]
    assert len(sources) > 5
    for source in sources:
        for line in source.read_text().splitlines():
            if line.startswith("#include"):
                assert not any(name in line for name in ("torch", "ATen", "c10", "pybind11")), (source.name, line)


def test_blocks_fit_in_shared_memory():
    tiers = cuda_report.tiers()
    assert max(items * threads for items, threads in tiers.items()) == 16384
    for kernel in cuda_report.BUFFERS:
        for items in tiers:
            assert cuda_report.dynamic_shared(kernel, items) <= min(cuda_report.SHARED.values()), (kernel, items)


@needs_nvcc
def test_no_spills():
    rows = cuda_report.report([90])
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {*cuda_report.BUFFERS, "cells_kernel", "keys_kernel", "sort_input_kernel", "sort_output_kernel"}
    print(cuda_report.markdown(rows))
    bad = [row for row in rows if set(row["problem"]) - {"spills in cub"}]
    assert not bad, bad


@pytest.fixture(scope="module")
def selftest(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("selftest") / "selftest"
    sources = [ROOT / "tests" / "cuda_selftest.cu"]
    sources += [cuda_report.CSRC / name for name in ("segmented_sort.cu", "wasserstein_1d.cu")]
    sources += [EMULATION / "device_sort.cpp"]
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{EMULATION}"]
    done = subprocess.run(
        [*command, "-x", "c++", *map(str, sources), "-o", str(program)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return program


@needs_gxx
@pytest.mark.parametrize(
    "longest,shortest", [(33, 1), (1025, 1024), pytest.param(16385, 16384, marks=pytest.mark.slow)]
)
def test_kernels_on_the_cpu(selftest, longest, shortest):
    """Both sides of the tiers, and of the way through device memory, with every pattern of the self-test."""
    done = subprocess.run([selftest, str(longest), str(shortest)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " checks, 0 failed" in done.stdout
