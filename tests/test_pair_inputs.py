"""Losses of rows against other rows, memories and statistics: bad input is refused by name before any kernel runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcl import (
    InstanceDiscrimination,
    MemoryBank,
    Queue,
    clip_loss,
    contrastive_stats,
    dcl_loss,
    info_nce,
    instance_discrimination_loss,
    nt_xent_views,
    sample_hard_negatives,
    siglip_loss,
    supcon_loss,
)

N, D, K = 6, 8, 16
NAN, INF = math.nan, math.inf
# Made here: constructors draw, which counts as a computation.
QUEUE, BANK, SMALL = Queue(K, D), MemoryBank(K, D), Queue(N - 1, D)
CRITERIA = {m: InstanceDiscrimination(K, D, num_negatives=m) for m in (None, 4)}


def enqueue(**arguments):
    return QUEUE.enqueue(**arguments)


def enqueue_small(**arguments):
    return SMALL.enqueue(**arguments)


def update(**arguments):
    return BANK.update(**arguments)


def full(**arguments):
    return CRITERIA[None](**arguments)


def estimate(**arguments):
    return CRITERIA[4](**arguments)


def rows(n=N, d=D):
    return torch.randn(n, d)


# A valid call of each; `estimate` is the module with noise, the others are what they are called.
VALID = {
    info_nce: lambda: {"query": rows(), "keys": rows()},
    clip_loss: lambda: {"image": rows(), "text": rows(), "logit_scale": 10.0},
    siglip_loss: lambda: {"image": rows(), "text": rows(), "logit_scale": 10.0, "logit_bias": -10.0},
    dcl_loss: lambda: {"z1": rows(), "z2": rows()},
    supcon_loss: lambda: {"features": rows(), "labels": torch.arange(N) % 2},
    nt_xent_views: lambda: {"views": [rows() for _ in range(3)]},
    instance_discrimination_loss: lambda: {"query": rows(), "indices": torch.arange(N), "bank": rows(K)},
    sample_hard_negatives: lambda: {"query": rows(), "queue": rows(K)},
    contrastive_stats: lambda: {"z1": rows(), "z2": rows()},
    enqueue: lambda: {"keys": rows()},
    update: lambda: {"indices": torch.arange(N), "features": rows()},
    full: lambda: {"query": rows(), "indices": torch.arange(N)},
    estimate: lambda: {"query": rows(), "indices": torch.arange(N)},
}
NAMES = {enqueue: "Queue.enqueue", enqueue_small: "Queue.enqueue", update: "MemoryBank.update"}
NAMES |= dict.fromkeys((full, estimate), "instance_discrimination_loss")
VALID[enqueue_small] = lambda: {"keys": rows(N - 1)}
LOSSES = (info_nce, clip_loss, siglip_loss, dcl_loss, supcon_loss, nt_xent_views, instance_discrimination_loss)
PAIRS = {info_nce: ("query", "keys"), clip_loss: ("image", "text"), siglip_loss: ("image", "text")}
PAIRS |= {dcl_loss: ("z1", "z2"), contrastive_stats: ("z1", "z2")}
TEMPERED = (info_nce, dcl_loss, supcon_loss, nt_xent_views, instance_discrimination_loss, contrastive_stats)
NUMBERS = {function: "temperature" for function in TEMPERED} | dict.fromkeys((clip_loss, siglip_loss), "logit_scale")
# Arguments that are integers a row, and what the message calls the length of the table that they point into.
INTEGERS = {info_nce: "ids", supcon_loss: "labels", instance_discrimination_loss: "indices", update: "indices"}
INTEGERS |= {full: "indices", estimate: "indices"}


def name_of(function):
    return NAMES.get(function, function.__name__)


def bad(what, function, error, argument, **changes):
    """A case: a valid call with some arguments changed, by a function of them where one is given, and the argument that
    the message names."""
    return pytest.param(function, error, argument, changes, id=f"{function.__name__} {argument} {what}"[:90])


def nested(x):
    return torch.nested.nested_tensor([x[0], x[1, :3]])


def meta(x):
    return x.to("meta")


NOT_ROWS = {
    "int64": (TypeError, torch.Tensor.long), "bool": (TypeError, torch.Tensor.bool),
    "complex": (TypeError, lambda x: x.to(torch.complex64)), "float8": (TypeError, lambda x: x.to(torch.float8_e4m3fn)),
    "list": (TypeError, torch.Tensor.tolist), "numpy": (TypeError, torch.Tensor.numpy),
    "sparse": (TypeError, torch.Tensor.to_sparse), "nested": (TypeError, nested),
    "0-D": (ValueError, lambda x: x[0, 0]), "1-D": (ValueError, lambda x: x[0]),
    "4-D": (ValueError, lambda x: x[None, None]), "D = 0": (ValueError, lambda x: x[:, :0]),
}  # fmt: skip
ROWS = [(function, argument) for function, pair in PAIRS.items() for argument in pair]
ROWS += [(supcon_loss, "features"), (instance_discrimination_loss, "query"), (instance_discrimination_loss, "bank")]
ROWS += [(info_nce, "negatives"), (sample_hard_negatives, "query"), (sample_hard_negatives, "queue")]
ROWS += [(enqueue, "keys"), (update, "features"), (full, "query"), (estimate, "query")]
NONE = [(function, argument) for function, argument in ROWS if argument != "negatives"]
TENSORS = [
    *(
        bad(what, f, error, a, **{a: (lambda x, change=change: change(rows(K) if x is None else x))})
        for f, a in ROWS
        for what, (error, change) in NOT_ROWS.items()
    ),
    *(bad("None", f, TypeError, a, **{a: None}) for f, a in NONE),
    *(bad("3-D", f, ValueError, a, **{a: lambda x: x[None]}) for f, a in NONE if f is not supcon_loss),
    bad("V = 0", supcon_loss, ValueError, "features", features=lambda x: x[:, None][:, :0]),
    *(bad("D differs", f, ValueError, f"{a} and {b}", **{b: rows(N, D + 1)}) for f, (a, b) in PAIRS.items()),
    *(bad("N differs", f, ValueError, f"{a} and {b}", **{b: rows(N - 1)}) for f, (a, b) in PAIRS.items()),
    *(bad("one row", f, ValueError, f"{a} and {b}", **{b: rows(1)}) for f, (a, b) in PAIRS.items()),
    *(bad("mixed", f, TypeError, f"{a} and {b}", **{b: torch.Tensor.half}) for f, (a, b) in PAIRS.items()),
    *(bad("devices", f, ValueError, f"{a} and {b}", **{b: meta}) for f, (a, b) in PAIRS.items()),
    *(
        bad("N = 0", f, ValueError, a if f is info_nce else f"{a} and {b}", **{a: rows(0), b: rows(0)})
        for f, (a, b) in PAIRS.items()
    ),
    bad("N = 0", supcon_loss, ValueError, "features", features=rows(0), labels=lambda x: x[:0]),
    bad("N = 0", supcon_loss, ValueError, "features", features=torch.randn(0, 2, D), labels=lambda x: x[:0]),
    bad("N = 0", nt_xent_views, ValueError, "views", views=[rows(0)] * 3),
    bad("N = 0", nt_xent_views, ValueError, "view 1 and view 2", views=[rows(0)] * 2),
    *(
        bad("N = 0", f, ValueError, "query", query=rows(0), indices=lambda x: x[:0])
        for f in (instance_discrimination_loss, full, estimate)
    ),
    *(
        case
        for f, a in ((info_nce, "negatives"), (instance_discrimination_loss, "bank"), (sample_hard_negatives, "queue"))
        for case in (
            bad("D differs", f, ValueError, a, **{a: rows(K, D + 1)}), bad("empty", f, ValueError, a, **{a: rows(0)}),
            bad("elsewhere", f, ValueError, a, **{a: meta(rows(K))}),
        )
    ),
    *(bad("D differs", f, ValueError, "keys", keys=rows(N, D + 1)) for f in (enqueue, enqueue_small)),
    bad("elsewhere", enqueue, ValueError, "keys", keys=meta),
    bad("more than the queue", enqueue_small, ValueError, "keys", keys=rows()),
    bad("D differs", update, ValueError, "features", features=rows(N, D + 1)),
    bad("elsewhere", update, ValueError, "features", features=meta),
    *(bad("D differs", f, ValueError, "bank", query=rows(N, D + 1)) for f in (full, estimate)),
]  # fmt: skip
VIEWS = [
    bad("a tensor", nt_xent_views, TypeError, "views", views=torch.randn(2, N, D)),
    bad("a generator", nt_xent_views, TypeError, "views", views=(x for x in ())),
    bad("None", nt_xent_views, TypeError, "views", views=None),
    *(bad(f"{count} of them", nt_xent_views, ValueError, "views", views=[rows()] * count) for count in (0, 1)),
    *(
        case
        for count in (2, 3)
        for v in [f"view {count}"]
        for case in (
            bad("list", nt_xent_views, TypeError, v, views=[rows()] * (count - 1) + [rows().tolist()]),
            bad("3-D", nt_xent_views, ValueError, v, views=[rows()] * (count - 1) + [rows()[None]]),
            bad("int64", nt_xent_views, TypeError, "view 1", views=[rows().long()] * count),
            bad("N differs", nt_xent_views, ValueError, f"view 1 and {v}", views=[rows()] * (count - 1) + [rows(1)]),
            bad("mixed", nt_xent_views, TypeError, f"view 1 and {v}", views=[rows()] * (count - 1) + [rows().half()]),
            bad("devices", nt_xent_views, ValueError, f"view 1 and {v}", views=[rows()] * (count - 1) + [meta(rows())]),
            bad("temperature", nt_xent_views, ValueError, "temperature", views=[rows()] * count, temperature=0),
            bad("reduction", nt_xent_views, ValueError, "reduction", views=[rows()] * count, reduction="avg"),
        )
    ),
]
INTEGER_ROWS = [
    *(
        case
        for f, a in INTEGERS.items()
        for case in (
            bad("float", f, TypeError, a, **{a: torch.ones(N)}), bad("bool", f, TypeError, a, **{a: torch.ones(N) > 0}),
            bad("list", f, TypeError, a, **{a: list(range(N))}), bad("numpy", f, TypeError, a, **{a: np.arange(N)}),
            bad("complex", f, TypeError, a, **{a: torch.ones(N, dtype=torch.complex64)}),
            bad("sparse", f, TypeError, a, **{a: torch.arange(N).to_sparse()}),
            bad("nested", f, TypeError, a, **{a: lambda _: nested(torch.ones(2, N).int())}),
            bad("short", f, ValueError, a, **{a: torch.arange(N - 1)}),
            bad("one for all", f, ValueError, a, **{a: torch.ones(1).long()}),
            bad("2-D", f, ValueError, a, **{a: torch.arange(N)[:, None]}),
            bad("0-D", f, ValueError, a, **{a: torch.tensor(1)}),
            bad("elsewhere", f, ValueError, a, **{a: torch.arange(N, device="meta")}),
        )
    ),
    *(
        bad(f"{low}", f, ValueError, "indices", indices=torch.arange(N) + low)
        for f in (instance_discrimination_loss, update, full, estimate)
        for low in (-1, K - N + 1, 2**40)
    ),
    *(bad("None", f, TypeError, a, **{a: None}) for f, a in INTEGERS.items() if a != "ids"),
    bad("a view", supcon_loss, ValueError, "labels", features=torch.randn(N, 2, D), labels=torch.ones(2 * N).int()),
]  # fmt: skip
ANY, CHOSEN = torch.zeros(N, 3).long(), {"negatives": rows(K)}
NEGATIVES = [
    bad("in_batch=False alone", info_nce, ValueError, "negatives", in_batch=False),
    *(
        bad("of a queue", info_nce, ValueError, a, negatives=rows(K), **{a: value})
        for a, value in (("ids", torch.arange(N)), ("log_q", torch.zeros(N)))
    ),
    bad("2e38", siglip_loss, ValueError, "logit_bias", logit_bias=2e38),
    bad("NaN tensor", siglip_loss, ValueError, "logit_bias", logit_bias=torch.tensor(math.nan)),
    bad("indices alone", info_nce, ValueError, "negatives", negative_indices=ANY),
    *(bad(f"{value!r}", info_nce, TypeError, "in_batch", in_batch=value) for value in (0, "no", torch.tensor(True))),
    *(
        bad(what, info_nce, error, "negative_indices", negative_indices=value, **CHOSEN)
        for what, error, value in (
            ("float", TypeError, ANY.float()), ("bool", TypeError, ANY > 0), ("list", TypeError, ANY.tolist()),
            ("sparse", TypeError, ANY.to_sparse()), ("1-D", ValueError, ANY[:, 0]), ("3-D", ValueError, ANY[..., None]),
            ("short", ValueError, ANY[1:]), ("-1", ValueError, ANY - 1), ("K", ValueError, ANY + K),
            ("m = 0", ValueError, ANY[:, :0]), ("one of them K", ValueError, torch.full((N, 1), K)),
            ("elsewhere", ValueError, meta(ANY)),
        )
    ),
    bad("learned", info_nce, ValueError, "negatives", negatives=rows(K).requires_grad_(), negative_indices=ANY),
    *(
        bad(what, info_nce, error, "log_q", log_q=value)
        for what, error, value in (
            ("int", TypeError, torch.ones(N).long()), ("list", TypeError, [0.0] * N), ("number", TypeError, 1.0),
            ("sparse", TypeError, torch.ones(N).to_sparse()), ("2-D", ValueError, torch.ones(N, 1)),
            ("short", ValueError, torch.ones(N - 1)), ("elsewhere", ValueError, torch.ones(N, device="meta")),
        )
    ),
]  # fmt: skip
WRONG = (0, 0.0, -0.0, -0.1, INF, -INF, NAN, 10**400, 1e-40)
WRONG_TENSORS = (torch.ones(2), torch.ones(N, 1), torch.empty(0), torch.tensor(1.0, device="meta"))
WRONG_TYPES = ("1", True, [1.0], 1j, np.array([1.0]), torch.tensor(1), torch.tensor(True), torch.ones(1).to_sparse())
SCALARS = [
    *(
        case
        for f, a in NUMBERS.items()
        for case in (
            *(bad(f"{value}"[:9], f, ValueError, a, **{a: value}) for value in WRONG),
            *(bad(f"tensor {value}", f, ValueError, a, **{a: torch.tensor(value)}) for value in (0.0, -0.1, INF, NAN)),
            *(bad(f"{value.shape} {value.device}", f, ValueError, a, **{a: value}) for value in WRONG_TENSORS),
            *(bad(f"{type(value)} {value}", f, TypeError, a, **{a: value}) for value in (None, *WRONG_TYPES)),
        )
    ),
    # Infinite in float32.
    *(bad("1e39", f, ValueError, "logit_scale", logit_scale=1e39) for f in (clip_loss, siglip_loss)),
    *(
        case
        for f, a in ((siglip_loss, "logit_bias"), (instance_discrimination_loss, "log_z"))
        for case in (
            *(bad(f"{value}"[:9], f, ValueError, a, **{a: value}) for value in (INF, -INF, NAN, 1e39, -(10**400))),
            *(bad(f"{value.shape} {value.device}", f, ValueError, a, **{a: value}) for value in WRONG_TENSORS),
            *(bad(f"{type(value)} {value}", f, TypeError, a, **{a: value}) for value in WRONG_TYPES),
        )
    ),
    bad("None", siglip_loss, TypeError, "logit_bias", logit_bias=None),
]
COUNTS = [(instance_discrimination_loss, "num_negatives"), (sample_hard_negatives, "num_samples")]
OPTIONS = [
    *(bad(f"{value!r}", f, ValueError, a, **{a: value}) for f, a in COUNTS for value in (0, -1)),
    *(
        bad(f"{value!r}", f, TypeError, a, **{a: value})
        for f, a in COUNTS
        for value in (2.0, "2", True, torch.tensor(2))
    ),
    *(
        bad(f"{value}"[:9], sample_hard_negatives, ValueError, a, **{a: value})
        for a in ("width",)
        for value in (-1, NAN, INF, 1e39, 10**400)
    ),
    bad("0", sample_hard_negatives, ValueError, "width", width=0),
    *(
        bad(f"{value!r}", sample_hard_negatives, TypeError, a, **{a: value})
        for a in ("width",)
        for value in ("1", None, True, torch.tensor(1.0))
    ),
    *(
        case
        for f, elsewhere in (
            (instance_discrimination_loss, {"query": meta, "indices": meta, "bank": meta}),
            (sample_hard_negatives, {"query": meta, "queue": meta}),
        )
        for case in (
            bad("3", f, TypeError, "generator", generator=3),
            bad("elsewhere", f, ValueError, "generator", generator=torch.Generator(), **elsewhere),
        )
    ),
    *(
        bad(f"{value!r}", f, TypeError, "normalize", normalize=value)
        for f in (*LOSSES, contrastive_stats, sample_hard_negatives)
        for value in ("no", 1, None)
    ),
    *(
        bad(f"{value!r}", f, ValueError, "reduction", reduction=value)
        for f in LOSSES
        for value in ("avg", "Mean", None, 1)
    ),
    *(bad("none", f, ValueError, "grad_reduction", grad_reduction="none") for f in LOSSES),
    *(bad("star", f, ValueError, "exchange", exchange="star") for f in LOSSES),
    *(
        bad(f"{value!r}", f, TypeError, "group", group=value)
        for f in (*LOSSES, contrastive_stats)
        for value in ("world", 3)
    ),
    *(bad(f"{value!r}", supcon_loss, ValueError, "form", form=value) for value in ("both", "", None, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    "function,error,argument,changes", [*TENSORS, *VIEWS, *INTEGER_ROWS, *NEGATIVES, *SCALARS, *OPTIONS]
)
@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_refused_by_name(no_kernel, function, error, argument, changes):
    given = VALID[function]()
    for key, change in changes.items():
        given[key] = change(given.get(key)) if callable(change) else change
    memories = (QUEUE, SMALL, BANK, *CRITERIA.values())
    before = [{key: x.clone() for key, x in memory.state_dict().items()} for memory in memories]
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**given)
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"{name_of(function)}: {argument} must "), message
    assert ", got " in message, message
    # A call that is refused changes nothing.
    for memory, old in zip(memories, before, strict=True):
        torch.testing.assert_close(dict(memory.state_dict()), old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", VALID, ids=lambda function: function.__name__)
def test_the_calls_are_valid(function):
    """Less what was changed, that is."""
    value = function(**VALID[function]())
    assert value is None or all(x.isfinite().all() for x in (value if isinstance(value, tuple) else [value]))


@pytest.mark.parametrize(
    "call,expected",
    [
        (
            lambda: info_nce(torch.randn(4, 8), torch.randn(4, 9)),
            "info_nce: query and keys must have the same shape [N, D], got [4, 8] and [4, 9]",
        ),
        (
            lambda: info_nce(rows(), rows(), negatives=rows(K), negative_indices=ANY + K),
            "info_nce: negative_indices must be from 0 to 15, got 16 to 16",
        ),
        (
            lambda: info_nce(rows(), rows(), in_batch=False),
            "info_nce: negatives must be given with in_batch=False or negative_indices, got None",
        ),
        (
            lambda: supcon_loss(rows(), torch.ones(N, 1).int()),
            "supcon_loss: labels must have shape [6], got [6, 1]",
        ),
        (
            lambda: supcon_loss(rows(), torch.ones(N).int(), form="both"),
            'supcon_loss: form must be "out" or "in", got \'both\'',
        ),
        (
            lambda: nt_xent_views([rows(), rows(5), rows()]),
            "nt_xent_views: view 1 and view 2 must have the same shape [N, D], got [6, 8] and [5, 8]",
        ),
        (
            lambda: siglip_loss(rows(), rows(), 10.0, torch.ones(2)),
            "siglip_loss: logit_bias must have one element, got shape [2]",
        ),
        (
            lambda: clip_loss(rows(), rows(), -1),
            "clip_loss: logit_scale must be positive and finite, got -1",
        ),
        (
            lambda: SMALL.enqueue(rows()),
            "Queue.enqueue: keys must fit a queue of 5, got 6 over all ranks",
        ),
        (
            lambda: BANK.update(torch.arange(N), rows(N, 9)),
            "MemoryBank.update: features must have 8 features, got shape [6, 9]",
        ),
    ],
)
def test_messages(no_kernel, call, expected):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == expected
