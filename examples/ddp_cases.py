"""The losses that `ddp_check.py` looks at: those of fastcl, and of the other libraries that are installed."""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastcl
from fastcl import reference

WIDTH = 16  # of the rows that losses get
TEMPERATURE, SCALE, BIAS = {"temperature": 0.3}, {"logit_scale": 7.0}, {"logit_bias": -5.0}


class Case(NamedTuple):
    """A loss over ranks and the same in one process, as functions of (views, ids, labels, **numbers)."""

    name: str
    together: Callable
    alone: Callable
    numbers: dict[str, float] = {}
    options: str = ""
    library: str = "fastcl"

    @property
    def ours(self):
        return self.library == "fastcl"


def unit(rows):
    return F.normalize(rows, dim=1)


# What a loss takes of a batch: all views, two, two of unit length, one with labels, the rows of two.
TAKES = {
    "views": lambda loss: lambda views, ids, labels, **numbers: loss(views, **numbers),
    "two": lambda loss: lambda views, ids, labels, **numbers: loss(views[0], views[1], **numbers),
    "unit": lambda loss: lambda views, ids, labels, **numbers: loss(*map(unit, views[:2]), **numbers),
    "labels": lambda loss: lambda views, ids, labels, **numbers: loss(views[0], labels, **numbers),
    "rows": lambda loss: lambda views, ids, labels, **numbers: loss(torch.cat(views[:2]), **numbers),
    "pairs": lambda loss: lambda views, ids, labels, **numbers: loss(**numbers)(torch.cat(views[:2]), ids.repeat(2)),
}  # fmt: skip


def our_cases():
    losses = {
        "nt_xent": (fastcl.nt_xent, reference.nt_xent, "two", TEMPERATURE),
        "decoupled_nt_xent": (fastcl.decoupled_nt_xent, reference.decoupled_nt_xent, "two", TEMPERATURE),
        "dcl_loss": (fastcl.dcl_loss, reference.dcl, "two", TEMPERATURE),
        "nt_xent_views": (fastcl.nt_xent_views, reference.nt_xent_views, "views", TEMPERATURE),
        "clip_loss": (fastcl.clip_loss, reference.clip, "unit", SCALE),
        "siglip_loss": (fastcl.siglip_loss, reference.siglip, "unit", SCALE | BIAS),
        "supcon_loss": (fastcl.supcon_loss, reference.supcon, "labels", TEMPERATURE),
        "info_nce": (fastcl.info_nce, reference.info_nce, "two", TEMPERATURE),
        "uniformity_loss": (fastcl.uniformity_loss, reference.uniformity, "rows", {}),
    }
    for name, (loss, exact, takes, numbers) in losses.items():
        for exchange in ("gather", "ring"):
            together = TAKES[takes](functools.partial(loss, exchange=exchange))
            yield Case(name, together, TAKES[takes](exact), numbers, f"exchange={exchange}")
    yield Case("swd_loss", _of_draws(fastcl.swd_loss), _of_draws(reference.swd))


def _of_draws(loss):
    """With the same samples and directions on every rank and in one process."""
    given = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def of_rows(rows):
        samples, directions = given.to(rows.device)
        return loss(rows, prior_samples=samples, projections=directions)

    return TAKES["rows"](of_rows)


def lightly_cases():
    if importlib.util.find_spec("torchvision"):
        from simclr import torchvision_compat  # noqa: F401  importable beside a CPU-only PyTorch
    from lightly.loss import NTXentLoss

    def of_two(gather):
        return TAKES["two"](lambda *views, temperature: NTXentLoss(temperature, gather_distributed=gather)(*views))

    for gather in (True, False):
        yield Case("NTXentLoss", of_two(gather), of_two(False), TEMPERATURE, f"gather_distributed={gather}")


def open_clip_cases():
    # By itself: the package around it imports tokenisers and models.
    path = Path(importlib.util.find_spec("open_clip").origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def over_ranks(kind, **options):
        def loss(*args, **numbers):
            return kind(rank=dist.get_rank(), world_size=dist.get_world_size(), **options)(*args, **numbers)

        return TAKES["unit"](loss)

    alone = TAKES["unit"](lambda *args, **numbers: module.ClipLoss()(*args, **numbers))
    for local in (False, True):
        for grad in (False, True):
            options = {"local_loss": local, "gather_with_grad": grad}
            text = ", ".join(f"{key}={value}" for key, value in options.items())
            yield Case("ClipLoss", over_ranks(module.ClipLoss, **options), alone, SCALE, text)
    alone = TAKES["unit"](lambda *args, **numbers: module.SigLipLoss()(*args, **numbers))
    yield Case("SigLipLoss", over_ranks(module.SigLipLoss), alone, SCALE | BIAS)


def metric_learning_cases():
    from pytorch_metric_learning.losses import NTXentLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    for efficient in (False, True):
        together = TAKES["pairs"](lambda temperature, e=efficient: DistributedLossWrapper(NTXentLoss(temperature), e))
        text = f"DistributedLossWrapper, efficient={efficient}"
        yield Case("NTXentLoss", together, TAKES["pairs"](NTXentLoss), TEMPERATURE, text)


def sentence_transformers_cases():
    if importlib.util.find_spec("torchvision"):
        from simclr import torchvision_compat  # noqa: F401
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    def of_two(gather):
        def loss(*views, logit_scale):
            criterion = MultipleNegativesRankingLoss(nn.Identity(), logit_scale, gather_across_devices=gather)
            return criterion.compute_loss_from_embeddings(list(views), None)

        return TAKES["two"](loss)

    yield Case("MultipleNegativesRankingLoss", of_two(True), of_two(False), SCALE, "gather_across_devices=True")


def grad_cache_cases():
    module = importlib.import_module(f"{_installed('grad_cache', 'gradcache')}.loss")
    together = TAKES["unit"](lambda *views: module.DistributedContrastiveLoss()(*views))
    yield Case("DistributedContrastiveLoss", together, TAKES["unit"](module.SimpleContrastiveLoss()))


def inf_cl_cases():
    from inf_cl import cal_inf_loss

    def both(image, text, logit_scale):
        sides = ((image, text), (text, image))
        return sum(cal_inf_loss(a, b, scale=logit_scale, head_dim=WIDTH) for a, b in sides) / 2

    yield Case("cal_inf_loss", TAKES["unit"](both), TAKES["unit"](both), SCALE)


# {library: (its cases, names of its package, whether it needs a GPU)}
PEERS = {
    "lightly": (lightly_cases, ("lightly",), False),
    "open_clip": (open_clip_cases, ("open_clip",), False),
    "pytorch-metric-learning": (metric_learning_cases, ("pytorch_metric_learning",), False),
    "sentence-transformers": (sentence_transformers_cases, ("sentence_transformers",), False),
    "GradCache": (grad_cache_cases, ("grad_cache", "gradcache"), False),
    "Inf-CL": (inf_cl_cases, ("inf_cl",), True),
}


def _installed(*packages):
    return next((name for name in packages if importlib.util.find_spec(name)), None)


def _version(package):
    projects = importlib.metadata.packages_distributions().get(package)
    return f" {importlib.metadata.version(projects[0])}" if projects else ""


def names():
    """What can be chosen: losses of fastcl, and other libraries."""
    return [*dict.fromkeys(case.name for case in our_cases()), *PEERS]


def choose(wanted, gpu, uneven):
    """(the cases to run, lines of the table about libraries that are not)."""
    cases, absent = [case for case in our_cases() if case.name in wanted], []
    for library, (make, packages, needs_gpu) in PEERS.items():
        if library not in wanted:
            continue
        package = _installed(*packages)
        if package is None:
            why = "not installed"
        elif needs_gpu and not gpu:
            why = "not run: needs a GPU"
        elif uneven:
            why = "not run: needs as many rows on every rank"
        else:
            try:
                cases += [case._replace(library=library + _version(package)) for case in make()]
                continue
            except Exception as error:  # whatever another library raises is a line of the table, not its end
                why = f"cannot be imported: {type(error).__name__}"
        absent.append({"library": library, "loss": "-", "with": "", "ranks": [], "ours": False, "verdict": why})
    return cases, absent
