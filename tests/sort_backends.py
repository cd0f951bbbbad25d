"""The implementations of the sorts: which tests run on each, and how an op is sent to one of them."""

from __future__ import annotations

import pytest

import fastcl.ops
from fastcl import _native
from fastcl.ops import chunked

BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)),
    "chunked",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def route(backend: str, monkeypatch) -> str:
    """Send the sorts to this backend; the device to put tensors on."""
    if backend == "chunked":
        for name in fastcl.ops.SORTS:
            monkeypatch.setattr(fastcl.ops, name, getattr(chunked, name))
    return "cuda" if backend == "cuda" else "cpu"
