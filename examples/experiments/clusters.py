"""Clusters of the locations of an encoder's feature maps, and how they agree with what is known about the pictures."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from torch import nn

from simclr import model
from simclr.errors import UsageError


def stages(encoder):
    """The modules whose outputs are the feature maps, from the first layer to the fourth."""
    if isinstance(encoder, model.ConvNet):
        return [part for part in encoder if isinstance(part, nn.ReLU)]
    found = [getattr(encoder, f"layer{depth}", None) for depth in range(1, 5)]
    if None in found:
        raise UsageError(f"--set arch: expected convnet or a ResNet, got {type(encoder).__name__}")
    return found


@torch.no_grad()
def feature_maps(encoder, pictures, layers):
    """{layer: [n, C, h, w]} of the frozen encoder, before its pooling."""
    maps, hooks = {}, []
    for layer, stage in enumerate(stages(encoder), 1):
        hooks.append(stage.register_forward_hook(lambda _, __, rows, layer=layer: maps.update({layer: rows.clone()})))
    encoder.eval()(pictures)
    for hook in hooks:
        hook.remove()
    return {layer: maps[layer] for layer in layers}


def patches(pictures, like):
    """The pixels of every location of the feature maps `like` [n, C, h, w]: [n, pixels, h, w]."""
    stride = pictures.shape[2] // like.shape[2]
    return F.pixel_unshuffle(pictures[:, :, : stride * like.shape[2], : stride * like.shape[3]], stride)


def clustered(maps, count, seed):
    """The cluster of every location of [n, C, h, w]: int64 [n, h, w], the largest cluster first."""
    rows = maps.float().permute(0, 2, 3, 1)
    found = KMeans(count, n_init=2, random_state=seed).fit_predict(rows.flatten(0, 2).cpu().numpy())
    order = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    return torch.from_numpy(np.argsort(order)[found]).view(rows.shape[:3])


def agreement(clusters, known):
    """Adjusted mutual information of clusters [n, h, w] and what is known at the middle of each location."""
    rows, columns = (torch.arange(inner) * outer // inner + outer // inner // 2
                     for inner, outer in zip(clusters.shape[1:], known.shape[1:]))
    known = known[:, rows][:, :, columns]
    return float(adjusted_mutual_info_score(known[known >= 0], clusters[known >= 0]))
