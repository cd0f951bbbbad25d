"""Random draws of the sliced Wasserstein distance: samples of a prior, and orthogonal directions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

PRIORS = ("normal", "hypercube", "hypersphere")


def check_prior(name: str, prior: object) -> None:
    if not isinstance(prior, str):
        raise TypeError(
            f"{name}: prior must be a name (samples go to prior_samples, a second view into z), "
            f"got {type(prior).__name__}"
        )
    checks.one_of(name, "prior", prior, PRIORS)


def seed(generator: torch.Generator | None) -> int:
    """A number from the generator, to draw the same on all ranks."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), device=device, generator=generator))


def prior_samples(prior: str, count: int, d: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """[count, d]: standard normal; uniform in (-1, 1)^d; or uniform on the unit sphere."""
    samples = like.new_empty((count, d))
    if prior == "hypercube":
        return samples.uniform_(-1, 1, generator=generator)
    samples.normal_(generator=generator)
    if prior == "hypersphere":
        samples /= torch.linalg.vector_norm(samples, dim=1, keepdim=True)
    return samples


@torch.compiler.assume_constant_result
def _float32_is_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # Set through torch.backends: that it cannot tell means that something is less than exact somewhere.
        return False


def orthogonal_projections(count: int, d: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """[count, d]: orthonormal directions, uniform over all such sets (Haar measure); beyond d in blocks of d, each
    orthonormal and independent of the others.

    A product of Householder reflections of normal vectors of falling length has this distribution (Stewart 1980), and
    in its compact form I - V inverse(T) V^T costs two matrix products and a triangular solve: no factorisation, whose
    column by column work is what takes the time of a QR on a GPU.
    """
    used = min(count, d)
    blocks = -(-count // d)
    # Reduced precision of matrix products would show in the right angles.
    dtype = like.dtype if _float32_is_exact() else torch.float64
    v = like.new_empty((blocks, d, used), dtype=dtype).normal_(generator=generator).tril()
    # Column j becomes the reflector that takes it to the axis e_j, pointing away from it: no cancellation.
    axis = torch.eye(d, used, dtype=dtype, device=like.device)
    corner = v.diagonal(dim1=1, dim2=2)
    # The last one is a single number, and normal_ does return 0: any reflector will do then.
    length = torch.linalg.vector_norm(v, dim=1).clamp_min(1e-6).copysign(corner)
    v = v + axis * length[:, None, :]
    with torch.autocast(like.device.type, enabled=False):
        gram = v.mT @ v
        t = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=1, dim2=2) / 2)
        q = axis - v @ torch.linalg.solve_triangular(t, v[:, :used].mT, upper=True)
    # The sign of each direction is that of its normal vector: without it the corner entries would not be symmetric.
    q = q * -length.sign()[:, None, :]
    return q.mT.reshape(blocks * used, d)[:count].to(like.dtype)
