"""Augmentations of the trainer of examples/: the recipe, and its form for a device beside that for one picture."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from scipy.stats import ks_2samp
from trainer_cases import one_thread  # noqa: F401

from simclr import augment, data
from simclr.errors import UsageError
from torchvision.transforms import v2

SIDE, DRAWS = 48, 800
UNLIKELY = 1e-3  # of two samples of one distribution; the draws are the same in every run


# The recipe


def steps_in(transform):
    """{type: transform} of a recipe, with what RandomApply holds."""
    found = {}
    for step in transform.transforms:
        found[type(step)] = step
        if isinstance(step, v2.RandomApply):
            found[type(step.transforms[0])] = step.transforms[0]
            assert step.p == {v2.ColorJitter: 0.8, augment.Blur: 0.5}[type(step.transforms[0])]
    return found


def test_views_of_photographs_follow_the_recipe():
    steps = steps_in(augment.photo_views(224, strength=0.5))
    assert steps[v2.RandomResizedCrop].scale == (0.08, 1.0) and tuple(steps[v2.RandomResizedCrop].size) == (224, 224)
    jitter = steps[v2.ColorJitter]
    assert [*jitter.brightness, *jitter.contrast, *jitter.saturation] == pytest.approx([0.6, 1.4] * 3)
    assert jitter.hue == pytest.approx((-0.1, 0.1))
    assert steps[v2.RandomHorizontalFlip].p == 0.5 and steps[v2.RandomGrayscale].p == 0.2
    blur = steps[augment.Blur]
    assert list(blur.kernel_size) == [23, 23] and list(blur.sigma) == [0.1, 2.0]


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_by_rows_and_columns_is_blur(sigma):
    picture = torch.rand(3, 20, 30)
    expected = v2.GaussianBlur([5, 7], (sigma, sigma))(picture)
    # Two sums of 5 and 7 products of float32 in the place of one of 35, all of numbers up to 1.
    torch.testing.assert_close(augment.Blur([5, 7], (sigma, sigma))(picture), expected, atol=12 * 2**-23, rtol=0)


@pytest.mark.parametrize("size, blur, blurred", [(64, None, False), (96, None, False), (128, None, True),
                                                 (64, True, True), (128, False, False)])
def test_small_pictures_are_blurred_only_on_demand(size, blur, blurred):
    source = data.open_data("synthetic", image_size=size, blur=blur)
    assert (augment.Blur in steps_in(source.views)) == blurred
    assert source.device_views.args == (size, 1.0, blurred, augment.CROP)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_the_share_of_a_crop_can_be_chosen(name):
    source = data.open_data(name, crop=[0.5, 0.6])
    (crop,) = [step for step in source.views.transforms if isinstance(step, v2.RandomResizedCrop)]
    assert tuple(crop.scale) == (0.5, 0.6)
    assert tuple(source.device_views().steps[0]._param_generator.scale) == (0.5, 0.6)


@pytest.mark.parametrize("strength", [-0.1, 2.6, math.inf, math.nan])
def test_the_jitter_has_a_largest_strength(strength):
    with pytest.raises(UsageError, match="--strength: expected 0 to 2.5, got "):
        data.open_data("synthetic", strength=strength)
    data.open_data("synthetic", strength=2.5)


# Views on a device


@pytest.fixture
def steps():
    """{type: transform} of one picture, and the modules for a batch in their order."""
    pytest.importorskip("kornia")
    return steps_in(augment.photo_views(SIDE)), list(augment.device_views(SIDE).steps)


def drawn(transform, module, picture):
    """Views [DRAWS, C, H, W] of one picture by either; of the module in many batches, each with one order of jitter.

    Rounded, because red's part of grey is 0.2989 here and 0.299 there.
    """
    batch = picture.expand(8, *picture.shape)
    ones = torch.stack([transform(picture) for _ in range(DRAWS)])
    return ones.round(decimals=3), torch.cat([module(batch) for _ in range(DRAWS // 8)]).round(decimals=3)


def same_distribution(measure, ones, batched):
    """Kolmogorov-Smirnov, of each number that `measure` makes of a view."""
    first, second = measure(ones), measure(batched)
    for name in first:
        assert ks_2samp(first[name], second[name]).pvalue > UNLIKELY, name


def test_crops_and_flips_on_a_device_are_those_of_one_picture(steps):
    """The picture's values are its coordinates: a view's ends and middle say where it was cut out."""

    def measure(views):
        x, y, half = views[:, 0], views[:, 1], SIDE // 2
        width, height = x[:, half, -1] - x[:, half, 0], y[:, -1, half] - y[:, 0, half]
        return dict(area=width.abs() * height, ratio=width.abs() / height, flipped=width < 0, x=x[:, half, half],
                    y=y[:, half, half])

    one, (crop, flip, *_) = steps
    across = torch.linspace(0, 1, SIDE).expand(SIDE, SIDE)
    ones, batched = drawn(v2.Compose([one[v2.RandomResizedCrop], one[v2.RandomHorizontalFlip]]),
                          torch.nn.Sequential(crop, flip), torch.stack([across, across.T]))
    same_distribution(measure, ones, batched)
    area = measure(batched)["area"]
    assert 0.06 < area.min() < 0.1 and area.max() > 0.97  # 0.08 to 1, in whole pixels


def test_colours_on_a_device_are_those_of_one_picture(steps):
    picture = torch.tensor([0.5, 0.35, 0.2])[:, None, None] + torch.tensor([-0.1, 0.1])
    picture = picture.expand(3, 4, 2).contiguous()

    def measure(views):
        means = views.mean((2, 3))
        return dict(brightness=means.mean(1), contrast=views.mean(1).std((1, 2)), red=means[:, 0], green=means[:, 1],
                    saturation=means.max(1).values - means.min(1).values,
                    untouched=(views - picture).abs().amax((1, 2, 3)) < 2e-3)

    one, (_, _, jitter, grey, _) = steps
    ones, batched = drawn(v2.RandomApply([one[v2.ColorJitter]], p=0.8), jitter, picture)
    same_distribution(measure, ones, batched)
    assert batched[:8].unique(dim=0).shape[0] > 4, "one draw for the batch"
    same_distribution(measure, *drawn(one[v2.RandomGrayscale], grey, picture))


def test_blur_on_a_device_is_that_of_one_picture(steps):
    one, (*_, blur) = steps
    ones, batched = drawn(v2.RandomApply([one[augment.Blur]], p=0.5), blur, torch.rand(3, 16, 16))
    same_distribution(lambda views: dict(spread=views.std((1, 2, 3))), ones, batched)


@pytest.mark.parametrize("name, size, channels", [("synthetic", 40, 3), ("digits", None, 1)])
def test_raw_pictures_become_views(name, size, channels):
    pytest.importorskip("kornia")
    source = data.open_data(name, image_size=size)
    raw = torch.stack([source.raw(source.train.read(index)) for index in (0, 0, 1)])
    module, before = source.device_views(), torch.get_rng_state()
    views, other = module(raw), module(raw)
    assert views.shape == (3, channels, source.image_size, source.image_size) and views.dtype == torch.float32
    assert 0 <= views.min() and views.max() <= 1 and views.max() > 0.1
    assert not torch.equal(views[0], views[1]) and not torch.equal(views, other)
    torch.set_rng_state(before)
    assert torch.equal(module(raw.float() / 255), views)


def test_without_kornia_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(UsageError, match="pip install --no-deps kornia"):
        augment.device_views(32)
