"""The random draws of swd_loss: directions uniform over all orthonormal sets, samples of the priors."""

from __future__ import annotations

import pytest
import torch

from fastcl.losses import draws
from fastcl.losses.draws import orthogonal_projections

DOUBLE, SINGLE = torch.empty(0, dtype=torch.float64), torch.empty(0)
MATRICES = 40_000


def assert_mean(what, values, expected):
    """The mean of independent values, to five standard errors: a false alarm once in two million."""
    error = values.std() / len(values) ** 0.5
    distance = (values.mean() - expected).abs()
    assert distance <= 5 * error, f"{what}: {values.mean():.5f}, expected {expected:.5f} +- {error:.5f}"


def departure(q):
    """How far the rows are from orthonormal."""
    q = q.double()
    return (q @ q.T - torch.eye(len(q), dtype=q.dtype)).abs().max().item()


@pytest.mark.parametrize("count", [1, 2, 5, 7, 8, 9, 15, 16, 20])
def test_blocks_are_orthonormal(count):
    q = orthogonal_projections(count, 8, DOUBLE, None)
    assert q.shape == (count, 8) and q.dtype == torch.float64
    for block in q.split(8):
        assert departure(block) < 1e-14
    # Beyond the first block directions are drawn anew, and no block repeats another.
    products = (q @ q.T).abs()
    assert count <= 8 or products[:8, 8:].max() > 0.01
    assert products.fill_diagonal_(0).max() < 1 - 1e-6


@pytest.mark.parametrize("d", [1, 2, 3, 64, 512])
def test_orthonormal_in_float32(d):
    """Products of reflectors with 24 bits: the error grows with sqrt(d), and was 1.4e-6 at 512."""
    q = orthogonal_projections(d, d, SINGLE, None)
    assert q.dtype == torch.float32 and departure(q) < 1e-5


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_products_does_not_show(precision):
    """Products are then those of float64, and each entry is rounded once: twice 2^-24 of a row's length."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        q = orthogonal_projections(512, 512, SINGLE, None)
    finally:
        torch.set_float32_matmul_precision(before)
    assert q.dtype == torch.float32 and departure(q) <= 2 * 2.0**-24


@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-30])
def test_a_normal_number_that_is_zero(monkeypatch, zero):
    """normal_ returns 0 once in millions of numbers, and the last reflector of a block is a single one."""
    drawn = torch.Tensor.normal_

    def with_zero(x, **options):
        drawn(x, **options)[..., -1, -1] = zero
        return x

    monkeypatch.setattr(torch.Tensor, "normal_", with_zero)
    assert departure(orthogonal_projections(8, 8, SINGLE, None)) < 1e-5
    assert orthogonal_projections(1, 1, SINGLE, None).abs().item() == 1


def test_precision_set_through_backends(monkeypatch):
    """torch.get_float32_matmul_precision then raises, and float64 serves in doubt."""

    def raises():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    assert departure(orthogonal_projections(64, 64, SINGLE, None)) <= 2 * 2.0**-24


def test_autocast_does_not_show():
    state = torch.get_rng_state()
    expected = orthogonal_projections(20, 16, SINGLE, None)
    torch.set_rng_state(state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonal_projections(20, 16, SINGLE, None), expected)


@pytest.fixture
def one_thread():
    """For many small draws, which threads only hold up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("used", [3, 2, 1])
def test_directions_are_uniform(one_thread, used):
    """Moments of the entries of orthogonal 3 x 3 matrices under the Haar measure, also of their first rows alone."""
    d = 3
    if used == d:
        q = orthogonal_projections(MATRICES * d, d, DOUBLE, None).view(MATRICES, d, d)
    else:
        # Blocks after the first are whole: only a single block is cut.
        q = torch.stack([orthogonal_projections(used, d, DOUBLE, None) for _ in range(4000)])
    for i in range(used):
        for j in range(d):
            x = q[:, i, j]
            assert_mean(f"q_{i}{j}", x, 0)
            assert_mean(f"q_{i}{j}^2", x.square(), 1 / d)
            assert_mean(f"q_{i}{j}^4", x**4, 3 / (d * (d + 2)))
            # In three dimensions each coordinate of a uniform direction is uniform in (-1, 1).
            assert_mean(f"q_{i}{j} > 1/2", (x > 0.5).double(), 0.25)
            assert_mean(f"q_{i}{j}^2 q_{i}{j + 1}^2", x.square() * q[:, i, (j + 1) % d].square(), 1 / (d * (d + 2)))
    if used > 1:
        assert_mean("q_00 q_11", q[:, 0, 0] * q[:, 1, 1], 0)
        assert_mean("q_00^2 q_11^2", (q[:, 0, 0] * q[:, 1, 1]).square(), (d + 1) / (d * (d - 1) * (d + 2)))
        mixed = q[:, 0, 0] * q[:, 1, 1] * q[:, 0, 1] * q[:, 1, 0]
        assert_mean("q_00 q_11 q_01 q_10", mixed, -1 / (d * (d - 1) * (d + 2)))
    if used == d:
        assert_mean("determinant", torch.linalg.det(q), 0)


def test_blocks_are_independent():
    q = orthogonal_projections(MATRICES * 3, 3, DOUBLE, None).view(MATRICES // 2, 2, 3, 3)
    first, second = q.unbind(1)
    for i in range(3):
        for j in range(3):
            assert_mean(f"q_{i}{j} of neighbours", first[:, i, j] * second[:, i, j], 0)
            assert_mean(f"q_{i}{j}^2 of neighbours", (first[:, i, j] * second[:, i, j]).square(), 1 / 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_priors(d, dtype):
    like = torch.empty(0, dtype=dtype)
    x = {prior: draws.prior_samples(prior, MATRICES, d, like, None) for prior in draws.PRIORS}
    assert all(samples.shape == (MATRICES, d) and samples.dtype == dtype for samples in x.values())
    # Second and fourth moments of each coordinate.
    moments = {"normal": (1, 3), "hypercube": (1 / 3, 1 / 5), "hypersphere": (1 / d, 3 / (d * (d + 2)))}
    for prior, (second, fourth) in moments.items():
        for j in range(d):
            column = x[prior][:, j].double()
            assert_mean(f"{prior} x", column, 0)
            if prior == "hypersphere" and d == 1:
                # Nothing but 1 and -1.
                assert column.abs().eq(1).all()
                continue
            assert_mean(f"{prior} x^2", column.square(), second)
            assert_mean(f"{prior} x^4", column**4, fourth)
        if d > 1:
            assert_mean(f"{prior} x_0 x_1", x[prior][:, 0].double() * x[prior][:, 1], 0)
    assert x["hypercube"].abs().max() <= 1 and x["hypercube"].abs().max() > 0.999
    # Lengths after division: a few roundings.
    lengths = x["hypersphere"].double().square().sum(1)
    assert (lengths - 1).abs().max() <= 8 * torch.finfo(dtype).eps
