"""fastcl.integrations.pytorch_metric_learning against pytorch_metric_learning itself."""

from __future__ import annotations

import math

import pytest
import torch

from fastcl import nt_xent, reference
from fastcl.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss
from peers import agree, cold, hold, learned, require, run, same_arguments

theirs = require("pytorch_metric_learning")
BOTH = [(NTXentLoss, theirs.NTXentLoss), (SupConLoss, theirs.SupConLoss)]
LABELS = {
    "some of each": [0, 0, 1, 1, 2, 3, 0, 5, 1],
    "negative and large": [-7, 2**40, -7, 2**40, 0, 0, 2**40 + 1, -7, 3],
    "two views": [0, 1, 2, 3, 0, 1, 2, 3],
    "one pair": [4, 4, 1, 2, 3],
    "one other": [1, 1, 1, 1, 0],
    "all the same": [3, 3, 3, 3],
    "all different": [0, 1, 2, 3],
    "two of a kind": [0, 0],
    "two kinds": [0, 1],
    "one row": [0],
}


def labelled(labels, ref=(None, None)):
    """A loss as a function of the embeddings alone."""
    return lambda criterion: lambda x, *refs: criterion(x, torch.tensor(labels), None, *refs, *ref[1:])


def pairs(z, labels, temperature, refs=None, ref_labels=None):
    """The specification of NTXentLoss: the mean over pairs of the same label of the cross entropy of that pair against
    the rows of other labels."""
    z = reference.normalize(z)
    other, ids = (z, labels) if refs is None else (reference.normalize(refs), ref_labels)
    same = labels[:, None] == ids[None, :]
    S = z @ other.T / temperature
    negatives = S.masked_fill(same, -torch.inf).logsumexp(1)
    if refs is None:
        same = same & ~torch.eye(len(z), dtype=torch.bool)
    return reference.cross_entropy_rows(negatives[:, None].expand_as(S)[same], S[same]).mean()


@pytest.mark.parametrize(("ours", "original"), BOTH)
def test_arguments(ours, original):
    # The rest of the constructor's, of distance, reducer and regulariser, goes through **kwargs there.
    same_arguments(ours, original, left_out=("kwargs",))


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(("ours", "original"), BOTH)
def test_value_and_gradient(ours, original, labels, temperature):
    options = {} if temperature is None else {"temperature": temperature}
    of = labelled(labels)
    agree(of(ours(**options)), of(original(**options)), torch.randn(len(labels), 6, dtype=torch.float64))


def test_in_float32():
    labels = torch.arange(48) % 11
    x = torch.randn(48, 12, dtype=torch.float64)
    of = labelled(labels.tolist())
    hold(of(NTXentLoss(0.2)), of(theirs.NTXentLoss(0.2)), lambda z: pairs(z, labels, 0.2), x)
    hold(of(SupConLoss(0.2)), of(theirs.SupConLoss(0.2)), lambda z: reference.supcon(z, labels, 0.2), x)


@pytest.mark.parametrize(
    ("labels", "ref_labels"),
    [
        ([0, 0, 1, 2, 5], [0, 2, 2, 1, 1, 0, 7]),
        ([0, 1, 2], [3, 4]),
        ([0, 0, 0], [0, 0]),
        ([0, 0, 1], [0, 0]),
        ([0], [0]),
        ([0], [1]),
    ],
    ids=str,
)
def test_reference_rows(labels, ref_labels):
    leaves = torch.randn(len(labels), 6, dtype=torch.float64), torch.randn(len(ref_labels), 6, dtype=torch.float64)
    of = labelled(labels, (None, torch.tensor(ref_labels)))
    agree(of(NTXentLoss()), of(theirs.NTXentLoss()), *leaves)


def test_reference_rows_with_the_very_labels():
    """Row i of both is then the same sample, and no pair; equal labels in another tensor say nothing of that."""
    labels = torch.arange(8) % 3
    leaves = torch.randn(2, 8, 6, dtype=torch.float64).unbind(0)
    for ref_labels in (labels, labels.clone()):
        run = lambda loss: lambda z, refs: loss(z, labels, None, refs, ref_labels)  # noqa: B023, E731
        agree(run(NTXentLoss()), run(theirs.NTXentLoss()), *leaves)


def test_compiled_whole():
    x, labels = torch.randn(8, 6), torch.arange(8) % 3
    for ours in (NTXentLoss(), SupConLoss()):
        found = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, labels)
        torch.testing.assert_close(found, ours(x, labels), rtol=0, atol=0)


def test_reference_rows_in_float32():
    labels, ref_labels = torch.arange(30) % 7, torch.arange(40) % 9
    leaves = torch.randn(30, 12, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
    of = labelled(labels.tolist(), (None, ref_labels))
    exact = lambda z, refs: pairs(z, labels, 0.2, refs, ref_labels)  # noqa: E731
    hold(of(NTXentLoss(0.2)), of(theirs.NTXentLoss(0.2)), exact, *leaves)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inside_the_wrapper_for_two_views(symmetric):
    views = torch.randn(2, 7, 6, dtype=torch.float64)
    wrap = lambda loss: theirs.SelfSupervisedLoss(loss, symmetric=symmetric)  # noqa: E731
    agree(wrap(NTXentLoss(0.2)), wrap(theirs.NTXentLoss(0.2)), *views)
    if symmetric:
        agree(wrap(SupConLoss(0.2)), wrap(theirs.SupConLoss(0.2)), *views)
        agree(wrap(NTXentLoss(0.2)), lambda a, b: nt_xent(a, b, 0.2), *views)


@pytest.mark.parametrize("ours", [NTXentLoss, SupConLoss])
def test_labels_of_other_types(ours):
    x, labels = torch.randn(8, 6), torch.arange(8) % 3
    expected = ours()(x, labels)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(ours()(x, labels.to(dtype)), expected)


def test_low_temperature():
    """A pair whose share of the softmax is no float32 number: the original's term stops at -log(smallest float), 87,
    and pulls no more."""
    labels, x = torch.arange(64).repeat(2), torch.randn(128, 16).double()
    of = labelled(labels.tolist())
    exact = lambda z: pairs(z, labels, 1e-3)  # noqa: E731
    cold(of(NTXentLoss(1e-3)), exact, x)
    cold(of(SupConLoss(1e-3)), lambda z: reference.supcon(z, labels, 1e-3), x)
    value, grad = run(exact, (x,))
    stopped, their_grad = run(of(theirs.NTXentLoss(1e-3)), (x,), torch.float32)
    highest = -math.log(torch.finfo(torch.float32).tiny)
    assert value > 2 * highest and stopped < 1.01 * highest
    assert their_grad.norm() < 0.2 * grad.norm()


def test_rows_that_are_learned_count():
    """In exact numbers every row with a positive and a negative has a loss above 0. The original drops those that round
    to 0 from its mean."""
    labels, x = torch.arange(32).repeat(2), torch.randn(64, 16).double()
    # A quarter of the rows are not learned yet.
    views = torch.cat([x[:32], x[:32] + torch.where(torch.arange(32)[:, None] < 8, 1.0, 0.05) * x[32:]])
    of = labelled(labels.tolist())
    value, _ = run(lambda z: reference.supcon(z, labels, 0.01), (views,))
    ours, _ = run(of(SupConLoss(0.01)), (views,), torch.float32)
    their_value, _ = run(of(theirs.SupConLoss(0.01)), (views,), torch.float32)
    assert abs(ours / value - 1) < 1e-5 and their_value > 1.5 * value


def test_learned_batch():
    a = torch.randn(64, 16).double()
    labels = torch.arange(64).repeat(2)
    of = labelled(labels.tolist())
    learned(
        of(NTXentLoss(0.01)),
        of(theirs.NTXentLoss(0.01)),
        lambda z: pairs(z, labels, 0.01),
        torch.cat([a, a + 0.1 * torch.randn(64, 16)]),
    )
