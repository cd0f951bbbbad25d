"""What the drop-in losses share: no original is imported, their documentation, and what they refuse."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch

from fastcl import integrations
from fastcl.integrations import lightly, open_clip, pytorch_metric_learning, sentence_transformers
from peers import LOSSES, installed, original
from test_docs import BLOCK, README

CLASSES = [
    lightly.NTXentLoss,
    open_clip.ClipLoss,
    open_clip.SigLipLoss,
    pytorch_metric_learning.NTXentLoss,
    pytorch_metric_learning.SupConLoss,
    sentence_transformers.MultipleNegativesRankingLoss,
]


def library(kind: type) -> str:
    return kind.__module__.rpartition(".")[2]


def identity(kind: type) -> str:
    return f"{library(kind)}.{kind.__name__}"


def test_no_original_is_imported():
    """Nor by the package itself."""
    names = [f"fastcl.integrations.{name}" for name in LOSSES]
    code = f"import sys, {', '.join(names)}; print(sorted(set(sys.modules) & {set(LOSSES) | {'torchvision'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", LOSSES)
def test_every_public_class_is_listed(name):
    module = importlib.import_module(f"fastcl.integrations.{name}")
    defined = {
        value
        for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    assert defined == {kind for kind in CLASSES if library(kind) == name}


@pytest.mark.parametrize("kind", CLASSES, ids=identity)
def test_documentation(kind):
    """How to change over, what is the same, what is not, and an example that runs without the original."""
    text = inspect.getdoc(kind)
    line = f"from {kind.__module__} import {kind.__name__}"
    assert f"Migration: `{line}` in place of" in text and f">>> {line}" in text
    assert re.search(rf"^    from {kind.__module__} import .*{kind.__name__}", integrations.__doc__, re.MULTILINE)
    for part in ("The same: ", "On purpose different: ", "Args:", "Example:"):
        assert part in text, part
    for parameter in inspect.signature(kind).parameters:
        assert re.search(rf"\b{parameter}\b", text.split("Args:")[1]), f"{parameter} is not described"
    (example,) = doctest.DocTestFinder(recurse=False).find(kind, kind.__name__, globs={})
    assert len(example.examples) >= 3
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=output.append)
    assert not runner.failures, "".join(output)


def rows(n=4, d=3, dtype=torch.float32):
    return torch.ones(n, d, dtype=dtype)


LABELS = torch.arange(4)
METRIC = (pytorch_metric_learning.NTXentLoss, pytorch_metric_learning.SupConLoss)
RANKING = sentence_transformers.MultipleNegativesRankingLoss
MODEL = torch.nn.Identity()
NARROW = lightly.NTXentLoss(memory_bank_size=(8, 2))
REFUSED = [
    (ValueError, "temperature must be positive", lambda: lightly.NTXentLoss(0.0)),
    (TypeError, "temperature must be a number", lambda: lightly.NTXentLoss("0.1")),
    (ValueError, "memory_bank_size must be 0 or", lambda: lightly.NTXentLoss(memory_bank_size=8)),
    (ValueError, "memory_bank_size must be 0 or", lambda: lightly.NTXentLoss(memory_bank_size=(8, 3, 3))),
    (TypeError, "gather_distributed must be a bool", lambda: lightly.NTXentLoss(gather_distributed=1)),
    (ValueError, "must have the same shape", lambda: lightly.NTXentLoss()(rows(), rows(5))),
    (ValueError, "negatives must have shape", lambda: NARROW(rows(), rows())),
    (ValueError, "use_horovod must be False", lambda: open_clip.ClipLoss(use_horovod=True)),
    (ValueError, "world_size must be at least 1", lambda: open_clip.ClipLoss(world_size=0)),
    (ValueError, "world_size must be that of the default", lambda: open_clip.ClipLoss(world_size=2)(rows(), rows(), 1)),
    (ValueError, "world_size must be that of", lambda: open_clip.SigLipLoss(world_size=2)(rows(), rows(), 1, 0)),
    (ValueError, "dist_impl must be", lambda: open_clip.SigLipLoss(dist_impl="ring")),
    (ValueError, "logit_scale must be positive", lambda: open_clip.ClipLoss()(rows(), rows(), 0.0)),
    *((ValueError, "temperature must be positive", lambda kind=kind: kind(-1.0)) for kind in METRIC),
    *((ValueError, "labels must be given", lambda kind=kind: kind()(rows())) for kind in METRIC),
    *((TypeError, "labels must be an integer", lambda kind=kind: kind()(rows(), LABELS.float())) for kind in METRIC),
    *((ValueError, "labels must have shape", lambda kind=kind: kind()(rows(), LABELS[:3])) for kind in METRIC),
    *((ValueError, "embeddings must have shape", lambda kind=kind: kind()(rows()[0], LABELS)) for kind in METRIC),
    *((ValueError, "at least one row", lambda kind=kind: kind()(rows(0), LABELS[:0])) for kind in METRIC),
    *((ValueError, "indices_tuple must be None", lambda kind=kind: kind()(rows(), LABELS, ())) for kind in METRIC),
    (ValueError, "ref_labels must be given", lambda: METRIC[0]()(rows(), LABELS, ref_emb=rows())),
    (ValueError, "ref_emb must have shape", lambda: METRIC[0]()(rows(), LABELS, None, rows(4, 2), LABELS)),
    (TypeError, "ref_emb must be a tensor", lambda: METRIC[0]()(rows(), LABELS, ref_labels=LABELS)),
    (ValueError, "ref_emb and ref_labels must be None", lambda: METRIC[1]()(rows(), LABELS, None, rows(), LABELS)),
    (ValueError, "scale must be positive", lambda: RANKING(MODEL, scale=0)),
    (ValueError, "similarity_fct must be cos_sim or dot_score", lambda: RANKING(MODEL, similarity_fct=torch.cdist)),
    (ValueError, "similarity_fct must be cos_sim or dot_score", lambda: RANKING(MODEL, similarity_fct=MODEL)),
    (ValueError, "directions must be", lambda: RANKING(MODEL, directions=("query_to_doc", "query_to_query"))),
    (ValueError, "directions must be", lambda: RANKING(MODEL, directions=("query_to_doc", "doc_to_query"))),
    (ValueError, "partition_mode must be", lambda: RANKING(MODEL, partition_mode="whole")),
    (ValueError, "hardness_mode must be None", lambda: RANKING(MODEL, hardness_mode="all_negatives")),
    (TypeError, "gather_across_devices must be a bool", lambda: RANKING(MODEL, gather_across_devices=None)),
    (ValueError, "two or more columns", lambda: RANKING(MODEL)([{"sentence_embedding": rows()}])),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), REFUSED, ids=[f"{n}-{row[1]}" for n, row in enumerate(REFUSED)])
def test_refused(error, message, call, no_kernel):
    """Before any computation, in words that name the argument."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", LOSSES)
def test_migration_of_the_readme(name, monkeypatch):
    """Its example, run with the import of before and with that of after, gives the same loss and gradients."""
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    (block,) = (b for b in BLOCK.findall(README.read_text(encoding="utf-8")) if f"fastcl.integrations.{name} " in b)
    before, after, *rest = block.splitlines()
    names = after.partition(" import ")[2]
    assert re.fullmatch(rf"# from {LOSSES[name]} import {names}", before) and len(rest) <= 12
    monkeypatch.setitem(sys.modules, LOSSES[name], original(name))
    found = []
    for line in (before.removeprefix("# "), after):
        torch.manual_seed(0)
        namespace = {}
        exec("\n".join([line, *rest]), namespace)
        loss, *values = namespace.pop("loss"), *namespace.values()
        leaves = [x for x in values if isinstance(x, torch.Tensor) and x.requires_grad]
        leaves += [x for module in values if isinstance(module, torch.nn.Module) for x in module.parameters()]
        found.append([loss, *torch.autograd.grad(loss, leaves)])
        assert len(found[-1]) > 1
    for theirs, ours in zip(*found, strict=True):
        # Two float32 results of one quantity, each within the rule of error_rule.py.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_versions_of_the_readme():
    """Those that the tests install."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", README.with_name("constraints.txt").read_text(encoding="utf-8"), re.M))
    text = " ".join(README.read_text(encoding="utf-8").split())
    named = re.search(r"The tests compare with (.*?)\. ", text).group(1)
    assert re.findall(r"([\w-]+) (\d[\d.]*\d)", named) == [
        (name, pins[name])
        for name in ("lightly", "open_clip_torch", "pytorch-metric-learning", "sentence-transformers")
    ]
