"""Bad input to cached_backward, and what is left after a failure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcl import NTXentLoss, cached_backward, nt_xent
from test_gradient_cache import FEATURES, N, all_close, leaves, net, plain, rows, taken, two


def _fields(**tensors):
    return {"views": [tensors, tensors]}


# argument: [(what is passed in place of a good one, the error)]
BAD = {
    "chunks": [
        ({"chunks": 0}, ValueError),
        ({"chunks": -1}, ValueError),
        ({"chunks": True}, TypeError),
        ({"chunks": 2.0}, TypeError),
        ({"chunks": "2"}, TypeError),
        ({"chunks": None}, TypeError),
    ],
    "views": [
        ({"views": torch.randn(2, N, FEATURES)}, TypeError),
        ({"views": {"x": rows()}}, TypeError),
        ({"views": iter(two())}, TypeError),
        ({"views": None}, TypeError),
        ({"views": []}, ValueError),
        ({"views": [rows(), None]}, TypeError),
        ({"views": [rows(), "text"]}, TypeError),
        ({"views": [rows(), ["a", "b"]]}, TypeError),
        ({"views": [rows(), {"x": rows(), "mask": None}]}, TypeError),
        ({"views": [rows(), torch.tensor(1.0)]}, ValueError),
        ({"views": [rows(), {}]}, ValueError),
        ({"views": [rows(), []]}, ValueError),
        (_fields(x=rows(7), y=rows(6)), ValueError),
        (_fields(x=(rows(7), [rows(7), rows(6)])), ValueError),
        (_fields(x=rows(7), y=torch.tensor(1.0)), ValueError),
        (_fields(x=torch.tensor(1.0), y=rows(7)), ValueError),
    ],
    "encoder": [
        ({"encoder": None}, TypeError),
        ({"encoder": rows()}, TypeError),
        ({"encoder": [net(), None]}, TypeError),
        ({"encoder": [net()]}, ValueError),
        ({"encoder": [net()] * 3}, ValueError),
        ({"encoder": []}, ValueError),
    ],
    "loss_fn": [({"loss_fn": None}, TypeError), ({"loss_fn": torch.tensor(1.0)}, TypeError)],
}


@pytest.mark.parametrize(
    ("argument", "given", "error"),
    [(argument, *case) for argument, cases in BAD.items() for case in cases],
    ids=[f"{argument}-{index}" for argument, cases in BAD.items() for index in range(len(cases))],
)
def test_bad_input_does_not_reach_the_encoder(argument, given, error, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("bad input reached the encoder"))
    passed = {"encoder": net(), "views": two(), "loss_fn": nt_xent, "chunks": 2} | given
    with pytest.raises(error, match=f"^cached_backward: {argument} must .*, got .") as caught:
        cached_backward(**passed)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("encoder", "got"),
    [
        (lambda x: net()(x)[:1], r"encoder must return one row for each sample, 4, got \[1, 5\]"),
        (lambda x: net()(x).sum(), r"encoder must return one row for each sample, 4, got \[\]"),
        (lambda x: net()(x).T, r"encoder must return one row for each sample, 4, got \[5, 4\]"),
        (lambda x: (net()(x),), "encoder must return one row for each sample, 4, got tuple"),
        (lambda x: None, "encoder must return one row for each sample, 4, got NoneType"),
    ],
)
def test_an_encoder_that_returns_something_else(encoder, got):
    with pytest.raises(ValueError, match=f"^cached_backward: {got}$"):
        cached_backward(encoder, two(), lambda *_: pytest.fail("bad rows reached the loss"), 2)


def test_a_loss_that_is_no_number_of_the_rows():
    """It is refused before the encoder's second pass, which would find nothing to add."""
    temperature = torch.tensor(0.5, requires_grad=True)
    expected = "^cached_backward: loss_fn must return one number that depends on the rows, got "
    losses = [
        lambda x, y: 1.0,
        lambda x, y: None,
        lambda x, y: x.sum(1),
        lambda x, y: (x.sum(), y.sum()),
        lambda x, y: nt_xent(x.detach(), y.detach()),
        lambda x, y: nt_xent(x.detach(), y.detach(), temperature),
        lambda x, y: temperature * 2,
    ]
    for index, loss_fn in enumerate(losses):
        encoder = net()
        with pytest.raises(ValueError, match=expected):
            pytest.fail(f"loss {index} was taken: {cached_backward(encoder, two(), loss_fn, 2)}")
        assert all(p.grad is None for p in encoder.parameters()), index
    with torch.no_grad(), pytest.raises(ValueError, match=expected):
        cached_backward(net(), two(), nt_xent, 2)


class Stops(nn.Module):
    """An encoder whose call of this number raises."""

    def __init__(self, call):
        super().__init__()
        self.net, self.calls = net(), call

    def forward(self, x):
        self.calls -= 1
        if not self.calls:
            raise RuntimeError("stopped")
        return self.net(x)


@pytest.mark.parametrize("where", ["first chunk", "third chunk", "loss", "second pass"])
def test_failure_leaves_nothing_behind(where):
    """Neither hooks nor gradients nor a changed mode, and after it the same call succeeds. The second pass begins with
    its fifth chunk; the temperature's gradient is complete by then."""
    encoder = Stops({"first chunk": 1, "third chunk": 3, "second pass": 5}.get(where, -1))
    criterion = NTXentLoss(0.3, learnable_temperature=True).double()

    def loss_fn(x, y):
        if where == "loss":
            raise RuntimeError("stopped")
        return criterion(x, y)

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stopped"):
        cached_backward(encoder, two(), loss_fn, 2)
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in encoder.parameters())
    for module in encoder.modules():
        hooks = [value for name, value in vars(module).items() if name.endswith("_hooks")]
        assert len(hooks) > 5 and not any(hooks)
    taken(leaves(criterion))
    plain(encoder, two(), criterion)
    wanted = taken(leaves(encoder, criterion))
    cached_backward(encoder, two(), criterion, 2)
    all_close(taken(leaves(encoder, criterion)), wanted)
