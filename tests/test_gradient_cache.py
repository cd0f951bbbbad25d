"""cached_backward against the backward of the whole batch in float64: gradients, random numbers, memory."""

from __future__ import annotations

import collections
import weakref

import pytest
import torch
from torch import nn

import error_rule
from fastcl import NTXentLoss, cached_backward, clip_loss, info_nce, nt_xent, nt_xent_views, supcon_loss, swd_loss
from test_distributed import close

N, FEATURES, WIDTH = 7, 6, 5
# Sums of a few dozen float64 numbers in another order.
ROUNDING = 1e-12
Both = collections.namedtuple("Both", "first second")


def net(seed=0, features=FEATURES, between=nn.Tanh, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 8), between(), nn.Linear(8, WIDTH)).to(dtype)


def rows(count=N, features=FEATURES, seed=1, dtype=torch.float64):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def two(count=N, **options):
    return [rows(count, seed=1, **options), rows(count, seed=2, **options)]


class Of(nn.Module):
    """An encoder of a view that is no tensor: `parts` takes the tensors out of it."""

    def __init__(self, parts):
        super().__init__()
        self.parts, self.nets = parts, nn.ModuleList([net(1), net(2)])

    def forward(self, view):
        return sum(encode(x) for encode, x in zip(self.nets, self.parts(view), strict=True))


class Pairs(nn.Module):
    """Two rows a sample, [N, 2, D]."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return torch.stack([self.net(x), self.net(-x)], 1)


class Scaled(nn.Module):
    """CLIP's loss with its scale."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x, y):
        return clip_loss(x, y, self.log_scale.exp(), normalize=True)


def _structure(make, parts):
    return lambda: (Of(parts), [make(rows(seed=seed), rows(seed=seed + 10)) for seed in (1, 2)], nt_xent)


# -> (encoder, views, loss)
FORMS = {
    "two views": lambda: (net(), two(), nt_xent),
    "one view": lambda: (net(), [rows()], lambda z: supcon_loss(z, torch.arange(N) % 3)),
    "three views": lambda: (net(), [*two(), rows(seed=3)], lambda *z: nt_xent_views(list(z))),
    "views of other lengths": lambda: (net(), [*two(), rows(4, seed=3)], info_nce),
    "two encoders": lambda: ([net(1), net(2, 4)], [rows(), rows(features=4)], Scaled()),
    "two encoders in a tuple": lambda: ((net(1), net(2)), two(), Scaled()),
    "one encoder twice": lambda: ([net()] * 2, two(), Scaled()),
    "a method": lambda: (net().forward, two(), nt_xent),
    "learned temperature": lambda: (net(), two(), NTXentLoss(0.3, learnable_temperature=True).double()),
    "rows of three dimensions": lambda: (Pairs(), [rows()], lambda z: supcon_loss(z, torch.arange(N) % 3)),
    "a loss of one element": lambda: (net(), two(), lambda *z: nt_xent(*z).reshape(1)),
    "an unused view": lambda: (net(), two(), lambda x, y: x.square().sum()),
    "dict": _structure(lambda x, y: {"x": x, "y": y}, lambda view: (view["x"], view["y"])),
    "list": _structure(lambda x, y: [x, y], lambda view: view if type(view) is list else None),
    "tuple": _structure(lambda x, y: (x, y), lambda view: view if type(view) is tuple else None),
    "named tuple": _structure(Both, lambda view: (view.first, view.second)),
    "nested": _structure(lambda x, y: {"x": (x, {"y": y})}, lambda view: (view["x"][0], view["x"][1]["y"])),
}  # fmt: skip


def leaves(*functions):
    """The parameters of all of them, each once."""
    several = [x for f in functions for x in (f if isinstance(f, (list, tuple)) else [f])]
    modules = [x for x in (getattr(x, "__self__", x) for x in several) if isinstance(x, nn.Module)]
    return list(dict.fromkeys(p for x in modules for p in x.parameters()))


def plain(encoder, views, loss_fn):
    encoders = encoder if isinstance(encoder, (list, tuple)) else [encoder] * len(views)
    loss = loss_fn(*(encode(view) for encode, view in zip(encoders, views, strict=True)))
    loss.backward()
    return loss.detach()


def taken(parameters):
    """Their gradients, which are then gone."""
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return grads


def all_close(got, expected, tolerance=ROUNDING):
    for index, (x, y) in enumerate(zip(got, expected, strict=True)):
        close(x, y, tolerance, f"gradient {index}")


@pytest.mark.parametrize("chunks", [1, 2, 3, N, N + 5])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_backward(form, chunks):
    """Uneven chunks among them: 7 rows in 2 and in 3."""
    encoder, views, loss_fn = FORMS[form]()
    parameters = leaves(encoder, loss_fn)
    expected, wanted = plain(encoder, views, loss_fn), taken(parameters)
    loss = cached_backward(encoder, views, loss_fn, chunks)
    assert loss.shape == expected.shape and not loss.requires_grad
    close(loss, expected, ROUNDING, "loss")
    assert all(grad.abs().sum() > 0 for grad in wanted), "a gradient of 0 tells nothing"
    all_close(taken(parameters), wanted)


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_are_added_to_those_there(chunks):
    encoder = net()
    plain(encoder, two(), nt_xent)
    plain(encoder, two(5), nt_xent)
    wanted = taken(leaves(encoder))
    for count in (N, 5):
        cached_backward(encoder, two(count), nt_xent, chunks)
    all_close(taken(leaves(encoder)), wanted)


def test_views_that_require_grad_get_theirs():
    encoder = net()
    views, same = two(), [x.requires_grad_() for x in two()]
    views = [x.requires_grad_() for x in views]
    plain(encoder, same, nt_xent)
    cached_backward(encoder, views, nt_xent, 3)
    all_close([x.grad for x in views], [x.grad for x in same])


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("chunks", [1, 3, N])
def test_dropout_and_the_generator_afterwards(chunks, draws):
    """Gradients are those of the chunks' rows in one graph, in the order of the views, and so is the generator's state:
    the second pass, and what it draws, leaves no trace. The loss draws after the rows."""

    def loss_fn(x, y):
        return nt_xent(x, y) + (swd_loss(torch.cat([x, y])) if draws else 0)

    encoder = net(between=lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.5)))
    torch.manual_seed(9)
    expected = loss_fn(*(torch.cat([encoder(part) for part in x.tensor_split(chunks)]) for x in two()))
    expected.backward()
    state, wanted = torch.get_rng_state(), taken(leaves(encoder))
    torch.manual_seed(9)
    loss = cached_backward(encoder, two(), loss_fn, chunks)
    close(loss, expected.detach(), ROUNDING, "loss")
    all_close(taken(leaves(encoder)), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    cached_backward(encoder, two(), loss_fn, chunks)
    assert any(not torch.allclose(x, y) for x, y in zip(taken(leaves(encoder)), wanted, strict=True)), "drawn anew"


class Inside(nn.Module):
    """Autocast of its own, as the encoders of some libraries have."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.encoder(x)


@pytest.mark.parametrize("chunks", [1, 2, N])
@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where, chunks):
    """The weights that the first pass rounded have no graph: were they kept for the second, as autocast keeps weights,
    there would be no gradient."""
    encoder = net(dtype=torch.float32)
    used, views = Inside(encoder) if where == "inside" else encoder, two(dtype=torch.float32)
    exact_encoder = net()
    exact = plain(exact_encoder, [x.double() for x in views], nt_xent)
    found = []
    for backward in (plain, lambda *args: cached_backward(*args, chunks)):
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
            loss = backward(used, views, nt_xent)
        found.append([loss, *taken(leaves(encoder))])
    for index, (eager, got, wanted) in enumerate(zip(*found, [exact, *taken(leaves(exact_encoder))], strict=True)):
        error_rule.check(f"{index}", got, wanted, eager, torch.bfloat16)


class Watched(nn.Module):
    """An encoder that notes how many samples it sees, with and without gradient, and the numbers its graphs hold."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.seen = encoder, {True: [], False: []}
        self.alive, self.most = weakref.WeakSet(), 0

    def forward(self, x):
        self.seen[torch.is_grad_enabled()].append(len(x))
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.x):
            return self.encoder(x)

    def _pack(self, x):
        # With its graph the result of a layer would keep the layer's node, which keeps what is held.
        held = _Held(x.detach())
        if x.data_ptr() not in {p.data_ptr() for p in self.parameters()}:
            self.alive.add(held)
        self.most = max(self.most, self.held())
        return held

    def held(self):
        return sum(held.x.numel() for held in self.alive)


class _Held:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(("chunks", "parts"), [(1, [7]), (2, [4, 3]), (3, [3, 2, 2]), (12, [1] * 7)])
def test_activations_are_those_of_one_chunk(chunks, parts):
    encoder = Watched(net())
    encoder(rows(parts[0]))
    one, encoder.most = encoder.most, 0
    assert one >= 8 * parts[0], "the hidden layer is kept"
    plain(encoder, two(), nt_xent)
    assert encoder.most * parts[0] == one * 2 * N, "the graph of all rows holds those of all"
    encoder.most, encoder.seen = 0, {True: [], False: []}
    cached_backward(encoder, two(), nt_xent, chunks)
    assert encoder.seen == {False: parts * 2, True: parts * 2}
    assert encoder.most == one and encoder.held() == 0


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_encoder_beside_one_that_learns(frozen):
    encoders, loss_fn = [net(1), net(2)], Scaled()
    encoders[frozen].requires_grad_(False)
    parameters = leaves(encoders[1 - frozen], loss_fn)
    plain(encoders, two(), loss_fn)
    wanted = taken(parameters)
    cached_backward(encoders, two(), loss_fn, 3)
    all_close(taken(parameters), wanted)
    assert all(p.grad is None for p in encoders[frozen].parameters())


def test_frozen_in_part_or_as_a_whole():
    encoder, loss_fn = net(), Scaled()
    encoder[0].requires_grad_(False)
    for parameters in (leaves(encoder[2], loss_fn), leaves(loss_fn)):
        plain(encoder, two(), loss_fn)
        wanted = taken(parameters)
        cached_backward(encoder, two(), loss_fn, 3)
        all_close(taken(parameters), wanted)
        assert encoder[0].weight.grad is None
        encoder.requires_grad_(False)


def test_batch_norm_takes_the_statistics_of_a_chunk():
    """Another function than that of the batch, as documented; exact in one chunk and in evaluation."""
    found = {}
    for mode, chunks in (("train", 1), ("train", 3), ("eval", 3)):
        encoder = net(between=lambda: nn.BatchNorm1d(8)).train(mode == "train")
        expected, wanted = plain(encoder, two(), nt_xent), taken(leaves(encoder))
        encoder[1].reset_running_stats()
        loss = cached_backward(encoder, two(), nt_xent, chunks)
        found[mode, chunks] = (loss - expected).abs() / expected
        assert encoder[1].num_batches_tracked == (4 * chunks if mode == "train" else 0)
        if (mode, chunks) != ("train", 3):
            all_close(taken(leaves(encoder)), wanted)
    assert found["train", 1] <= ROUNDING and found["eval", 3] <= ROUNDING and found["train", 3] > 1e-3, found


def test_grad_scaler():
    """The scale is a power of two: gradients are those without it to the bit."""
    encoder = net()
    expected, wanted = cached_backward(encoder, two(), nt_xent, 3), taken(leaves(encoder))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    loss = cached_backward(encoder, two(), lambda *z: scaler.scale(nt_xent(*z)), 3)
    assert torch.equal(loss, expected * 2**10)
    scaler.unscale_(optimizer)
    assert all(torch.equal(x.grad, y) for x, y in zip(encoder.parameters(), wanted, strict=True))
    before = encoder[0].weight.detach().clone()
    scaler.step(optimizer)
    close(encoder[0].weight.detach(), before - 0.1 * wanted[0], ROUNDING, "weight")


def test_nan_in_the_data():
    views = two()
    views[1][2, 0] = float("nan")
    assert cached_backward(net(), views, nt_xent, 3).isnan()


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_view_without_samples(chunks):
    encoder, views = net(), [rows(0), rows()]

    def loss_fn(x, y):
        assert x.shape == (0, WIDTH)
        return x.sum() + y.square().sum()

    expected, wanted = plain(encoder, views, loss_fn), taken(leaves(encoder))
    close(cached_backward(encoder, views, loss_fn, chunks), expected, ROUNDING, "loss")
    all_close(taken(leaves(encoder)), wanted)
    with pytest.raises(ValueError, match="nt_xent: z1 and z2 must have at least one row"):
        cached_backward(encoder, two(0), nt_xent, chunks)
