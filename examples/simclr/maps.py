"""Where rows of many features lie: on a map of two dimensions, and along single directions beside their prior."""

import math

import torch
import torch.nn.functional as F

MOST, LEAST = 2000, 5  # rows of a map
DIRECTIONS = 5
ALIKE = 1e-5  # unit rows no further apart than this, in any feature, are one point


def flat_map(rows):
    """Indices [n] of up to MOST of the rows, and their places [n, 2] by t-SNE of their directions.

    None, None where there is nothing to lay out: too few rows, or all of them alike. The same rows give the same map,
    and no number is drawn from the program's random streams.
    """
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MOST].sort().values
    unit = F.normalize(rows.float().cpu()[chosen], dim=1)
    if len(unit) < LEAST or unit.shape[1] < 2 or not (unit - unit[0]).abs().max() > ALIKE:  # NaN is not greater
        return None, None
    from sklearn.manifold import TSNE  # takes a second
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    # About three times as many neighbours as the perplexity are looked at: small sets do not have them.
    method = TSNE(init="pca", perplexity=min(30.0, (len(unit) - 1) / 3), random_state=0)
    with threadpool_limits(1):  # its steps are short: where other processes are at work, threads wait for each other
        return chosen, method.fit_transform(unit.numpy())


def along_directions(rows):
    """Coordinates [n, DIRECTIONS] of rows [n, d] along random orthogonal unit vectors, the same at every call."""
    width = rows.shape[1]
    draw = torch.randn(width, min(DIRECTIONS, width), generator=torch.Generator().manual_seed(0))
    return rows @ torch.linalg.qr(draw).Q.to(rows)


def prior_density(prior, width):
    """(reach, t, density): how one coordinate along a unit vector is spread where rows of `width` features follow
    `prior`, over -reach..reach.

    Exact for the unit sphere and the normal distribution. A sum of many uniform entries is nearly normal with their
    variance, 1/3.
    """
    if prior == "hypersphere":  # the area of the sphere at height t: c (1 - t^2)^((width - 3) / 2)
        reach = min(1.0, 4.5 / math.sqrt(width))
        t = torch.linspace(-reach, reach, 403, dtype=torch.float64)[1:-1]
        log_c = math.lgamma(width / 2) - math.lgamma((width - 1) / 2) - math.log(math.pi) / 2
        return reach, t, (log_c + (width - 3) / 2 * (1 - t * t).log()).exp()
    variance = {"normal": 1.0, "hypercube": 1 / 3}[prior]
    reach = 4.5 * math.sqrt(variance)
    t = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    return reach, t, (-t * t / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)
