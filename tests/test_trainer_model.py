"""Encoders and heads of the trainer of examples/, and what may stand in the place of batch norm."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from trainer_cases import ENVIRONMENT, EXAMPLES, one_thread  # noqa: F401

from simclr import model
from simclr.errors import UsageError
from torch import nn

# Encoders


@pytest.mark.parametrize("arch, size, features", [
    ("convnet", 32, 128),
    ("resnet18", 32, 512),
    ("resnet10t", 32, 512),  # with a deep stem
    ("vit_small", 32, 384),
    ("test_vit", 32, 64),  # made for one size, without its patch in the name
    ("mobilenetv3_small_050", 64, 1024),  # its num_features, 288, are those before its last layer
])
def test_encoders(arch, size, features):
    encoder = model.build_encoder(arch, 1, size)
    assert encoder.training and encoder.num_features == features
    assert encoder(torch.rand(2, 1, size, size)).shape == (2, features)


def test_small_pictures_get_the_stem_that_keeps_their_size():
    small, large = (model.build_encoder("resnet18", 3, size) for size in (96, 97))
    assert small.conv1.stride == (1, 1) and large.conv1.stride == (2, 2)
    assert isinstance(small.maxpool, nn.Identity) and not isinstance(large.maxpool, nn.Identity)
    deep = model.build_encoder("resnet10t", 3, 32)
    assert deep.conv1[0].stride == (1, 1) and isinstance(deep.maxpool, nn.Identity)


@pytest.mark.parametrize("size, patch", [(224, 16), (112, 16), (96, 8), (64, 8), (48, 4), (32, 4), (28, 4), (16, 2)])
def test_small_pictures_get_small_patches(size, patch):
    encoder = model.build_encoder("vit_tiny_patch16_224", 3, size)
    assert encoder.patch_embed.patch_size == (patch, patch)
    assert encoder.patch_embed.num_patches == (size // patch) ** 2


@pytest.mark.parametrize("arch, size, expected", [
    ("vit_small", 100, "--image-size: expected a multiple of 16 pixels, the patch of vit_small_patch16_224, got 100"),
    ("vit_small", 33, "--image-size: expected a multiple of 4 pixels"),
    ("eva02_tiny_patch14_224", 48, "--image-size: expected a multiple of 14 pixels"),
    ("resnet19", 32, "--arch: expected .*resnet18.*; got resnet19"),
    ("convnett", 32, "--arch: expected .*such as convnet, .*; got convnett"),
    ("zzzz", 32, "--arch: expected .*such as resnet50, vit_small; got zzzz"),
    ("test_vit", 40, "--arch: expected one that makes rows of features of 3 x 40 x 40 pictures, got test_vit"),
])
def test_what_cannot_be_built_is_one_line(arch, size, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        model.build_encoder(arch, 3, size)
    assert "\n" not in str(caught.value)


def test_the_convnet_does_not_import_timm():
    code = "import sys; from simclr import model; model.build_encoder('convnet', 1, 32); print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=120)
    assert done.stdout == "False\n", done.stderr


# Heads


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_projection_head(layers):
    head = model.projection_head(8, layers, 4, hidden=6)
    widths = [(part.in_features, part.out_features) for part in head if isinstance(part, nn.Linear)]
    assert widths == list(zip([8, *[6] * (layers - 1)], [*[6] * (layers - 1), 4]))
    assert sum(isinstance(part, nn.ReLU) for part in head) == layers - 1
    norms = [part for part in head if isinstance(part, nn.BatchNorm1d)]
    assert len(norms) == layers and [norm.affine for norm in norms] == [True] * (layers - 1) + [False]
    assert isinstance(head[-1], nn.BatchNorm1d) and head(torch.rand(5, 8)).shape == (5, 4)
    assert all(part.bias is None for part in head if isinstance(part, nn.Linear))


def test_hidden_layers_are_as_wide_as_the_features_unless_told():
    assert model.projection_head(8, 2, 4)[0].out_features == 8


def test_without_a_layer_projections_are_the_features():
    rows = torch.rand(5, 8)
    assert model.projection_head(8, 0, 4)(rows) is rows


def test_a_predictor_ends_with_a_linear_layer():
    *_, relu, last = model.projection_head(8, 2, 4, hidden=6, last_norm=False)
    assert isinstance(relu, nn.ReLU) and isinstance(last, nn.Linear) and last.bias is not None


@pytest.mark.parametrize("layers", [-1, 5])
def test_heads_have_up_to_four_layers(layers):
    with pytest.raises(ValueError, match=f"projection_head: expected layers from 0 to 4, got {layers}"):
        model.projection_head(8, layers, 4)


# Norms


def small(channels=48):
    return nn.Sequential(nn.Conv2d(2, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten(),
                         model.projection_head(channels * 4, 2, 64))


def act_norm():
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(6)


def test_group_norm_takes_the_place_of_every_batch_norm():
    network = small()
    weight = network[1].weight
    with torch.no_grad():
        weight.zero_()
    grouped = model.group_norm(network)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in grouped.modules())
    norms = [part for part in grouped.modules() if isinstance(part, nn.GroupNorm)]
    # 48 channels with places: 24 is the largest divisor up to 32; 192 numbers in groups of 16; 64 in groups of 16.
    assert [(norm.num_channels, norm.num_groups, norm.affine) for norm in norms] == [
        (48, 24, True), (192, 12, True), (64, 4, False)]
    assert norms[0].weight is weight


def test_rows_under_group_norm_do_not_depend_on_each_other():
    pictures, others = torch.randn(2, 6, 2, 4, 4)
    for network, alone in ((small(), False), (model.group_norm(small()), True)):
        rows, beside = network(pictures), network(torch.cat([pictures[:3], others[3:]]))
        assert torch.allclose(rows[:3], beside[:3], atol=1e-6) == alone


@pytest.mark.parametrize("norm, channels, groups", [
    (nn.BatchNorm2d, 64, 32), (nn.BatchNorm2d, 37, 1), (nn.BatchNorm2d, 31, 31),
    (nn.BatchNorm1d, 2048, 32), (nn.BatchNorm1d, 128, 8), (nn.BatchNorm1d, 15, 1),
])
def test_groups_divide_the_channels(norm, channels, groups):
    assert model.group_norm(norm(channels)).num_groups == groups


def test_activations_inside_a_norm_stay():
    pictures = torch.randn(4, 6, 3, 3)
    norm = act_norm()
    expected = nn.functional.group_norm(pictures, 6).relu()
    torch.testing.assert_close(model.group_norm(copy.deepcopy(norm))(pictures), expected)
    torch.testing.assert_close(model.split_batch_norm(copy.deepcopy(norm), 1)(pictures), norm(pictures))


@pytest.mark.parametrize("build", [
    lambda: nn.BatchNorm2d(6), lambda: nn.BatchNorm1d(6), lambda: nn.BatchNorm1d(6, affine=False), act_norm,
    lambda: nn.BatchNorm2d(6, momentum=None), lambda: nn.BatchNorm2d(6, track_running_stats=False),
], ids=["2d", "1d", "not affine", "timm", "cumulative", "untracked"])
@pytest.mark.parametrize("rows", [12, 11, 6])
def test_split_batch_norm_is_the_norm_of_each_part(build, rows):
    """Against one copy of the norm a part: outputs, gradients, and the mean of their statistics, after two batches."""
    norm = build()
    shape = (6,) if isinstance(norm, nn.BatchNorm1d) else (6, 3, 3)
    copies, split = [copy.deepcopy(norm) for _ in range(3)], model.split_batch_norm(norm, 3)
    assert split.state_dict().keys() == copies[0].state_dict().keys()
    for _ in range(2):
        batch = torch.randn(rows, *shape) * 2 + torch.arange(rows).reshape(rows, *[1] * len(shape))
        ours, theirs = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        found = split(ours)
        expected = torch.cat([own(part) for own, part in zip(copies, theirs.tensor_split(3), strict=True)])
        torch.testing.assert_close(found, expected)
        upstream = torch.randn_like(found)
        found.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(ours.grad, theirs.grad)
        if norm.track_running_stats:
            for name in ("running_mean", "running_var"):
                mean = torch.stack([getattr(own, name) for own in copies]).mean(0)
                torch.testing.assert_close(getattr(split, name), mean)
            assert split.num_batches_tracked == copies[0].num_batches_tracked
    if norm.affine:
        torch.testing.assert_close(split.weight.grad, sum(own.weight.grad for own in copies))


def test_split_batch_norm_in_evaluation_and_with_few_rows_is_batch_norm():
    norm = nn.BatchNorm2d(6)
    norm(torch.randn(9, 6, 2, 2) + 3)
    split = model.split_batch_norm(copy.deepcopy(norm), 3)
    for rows in (5, 3, 1):
        batch = torch.randn(rows, 6, 2, 2)
        assert torch.equal(split(batch), norm(batch))
    assert torch.equal(split.running_var, norm.running_var)
    norm.eval(), split.eval()
    batch = torch.randn(12, 6, 2, 2)
    assert torch.equal(split(batch), norm(batch))


def test_checkpoints_fit_with_and_without_splits():
    torch.manual_seed(1)
    network = small()
    network(torch.randn(8, 2, 4, 4))
    split = model.split_batch_norm(small(), 2)
    split.load_state_dict(network.state_dict())
    small().load_state_dict(split.state_dict())
    pictures = torch.randn(8, 2, 4, 4)
    assert torch.equal(split.eval()(pictures), network.eval()(pictures))
    assert sum(isinstance(part, model.SplitBatchNorm) for part in split.modules()) == 3


def test_a_batch_has_at_least_one_part():
    with pytest.raises(ValueError, match="split_batch_norm: expected at least 1 split, got 0"):
        model.split_batch_norm(small(), 0)
