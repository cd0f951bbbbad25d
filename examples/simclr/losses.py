"""The losses that `--loss` offers, by name: what builds each, and the settings of its paper.

P1 is "Intriguing Properties of Contrastive Losses" (Chen, Luo & Li 2021). `align-uniform` is from "Understanding
Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere" (Wang & Isola 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from fastcl import AlignmentLoss, DecoupledNTXentLoss, GeneralizedContrastiveLoss, NTXentLoss, UniformityLoss


class AlignUniform(nn.Module):
    """Alignment of the views plus `weight` times the mean of the uniformity of each view, as Wang & Isola's code."""

    def __init__(self, weight, t):
        super().__init__()
        self.alignment, self.uniformity, self.weight = AlignmentLoss(), UniformityLoss(t), weight

    def forward(self, z1, z2):
        spread = (self.uniformity(z1) + self.uniformity(z2)) / 2
        return self.alignment(z1, z2) + self.weight * spread


@dataclass(frozen=True)
class Loss:
    title: str  # on the axis of a plot
    help: str
    module: Callable  # from keyword arguments to a module that takes both views' projections
    options: dict  # arguments that the command line may change, with their defaults
    fixed: dict = field(default_factory=dict)  # the others that the paper sets


LOSSES = {
    "nt_xent": Loss("NT-Xent", "SimCLR's loss", NTXentLoss, dict(temperature=0.2)),
    # P1's weight is 0.1 in its published form, where the alignment is a mean over the entries of a projection: beside
    # the sum over them that Eq. 4 has, that is 0.1 times their number, 128.
    "decoupled": Loss("Decoupled NT-Xent", "NT-Xent with a weight for its distribution term",
                      DecoupledNTXentLoss, dict(temperature=1.0, weight=12.8)),
    "swd-normal": Loss("SWD, normal", "alignment and sliced Wasserstein distance to a normal distribution",
                       GeneralizedContrastiveLoss, dict(weight=5.0), dict(prior="normal")),
    "swd-hypercube": Loss("SWD, hypercube", "the same to the uniform distribution in (-1, 1)^D",
                          GeneralizedContrastiveLoss, dict(weight=5.0), dict(prior="hypercube")),
    # Entries of unit rows are small, and so is a mean over their squares: P1 scales this one loss up.
    "swd-hypersphere": Loss("SWD, hypersphere", "the same to the uniform distribution on the unit sphere",
                            GeneralizedContrastiveLoss, dict(weight=5.0), dict(prior="hypersphere", loss_scale=1000.0)),
    "align-uniform": Loss("Alignment + uniformity", "alignment and uniformity on the unit sphere",
                          AlignUniform, dict(weight=1.0), dict(t=2.0)),
}
# An option of a loss or method, and its name among the settings of the command line.
SETTINGS = {"temperature": "temperature", "weight": "loss_weight", "queue": "queue", "momentum": "momentum",
            "bank_momentum": "bank_momentum", "noise": "noise", "hard_negatives": "hard_negatives"}


def arguments(kind, settings):
    """What a loss or method is built with: what is fixed, and its options as the settings have them."""
    return {**kind.fixed, **{argument: getattr(settings, SETTINGS[argument]) for argument in kind.options}}


def build(settings):
    """The loss as a module: both views' projections [N, D] to a scalar."""
    loss = LOSSES[settings.loss]
    return loss.module(**arguments(loss, settings))
