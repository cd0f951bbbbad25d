"""Test session set-up: the real Triton kernels run on the CPU through Triton's interpreter where no GPU is."""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Read when kernels are decorated, hence before anything imports them.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu(reason): needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items):
    if GPU:
        return
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker:
            why = marker.kwargs.get("reason")
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device" + (f": {why}" if why else "")))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_kernel(monkeypatch):
    """Anything that reaches the computation fails the test."""
    # Not above: the kernels are decorated for the interpreter or for a GPU.
    import fastcl.ops
    from fastcl.losses import alignment, draws
    from fastcl.ops import pairs, rows, sampled, similarity, softplus, sorting

    def reached(*_, **__):
        pytest.fail("bad input reached the computation")

    for name in fastcl.ops.SCHEMAS:
        monkeypatch.setattr(fastcl.ops, name, reached)
    functions = (similarity.TwoViewLoss, rows.UnitRows, rows.RowLogSumExp)
    functions += (pairs.PairLogSumExp, softplus.PairSoftplus, sampled.SampledLogSumExp)
    for function in (*functions, sorting.SegmentedSort, sorting.SlicedWasserstein):
        monkeypatch.setattr(function, "apply", reached)
    monkeypatch.setattr(alignment, "_with_lengths", reached)
    for name in ("prior_samples", "orthogonal_projections"):
        monkeypatch.setattr(draws, name, reached)
