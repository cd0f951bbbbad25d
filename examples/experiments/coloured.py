"""Digits in any colour on ground of any colour: shape alone tells the class, and colours most pictures apart."""

import torch

from experiments import datasets
from simclr import data


class ColouredDigits(data.MemoryPictures):
    """A digit in a bright colour of its own, on a dark ground of another: uint8 [3, size, size].

    Picture i shows digit i, three quarters of the side wide, at a random place.
    """

    def __init__(self, digits, labels, size=32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        count, digits = len(digits), datasets.resized(digits, size * 3 // 4)
        corners = torch.randint(size - digits.shape[-1] + 1, (count, 2), generator=generator).tolist()
        dark = torch.randint(128, (count, 3, 1, 1), generator=generator)
        bright = torch.randint(128, 256, (count, 3, 1, 1), generator=generator)
        opaque = torch.zeros(count, 1, size, size)
        for layer, digit, (top, left) in zip(opaque, digits, corners):
            layer[:, top : top + len(digit), left : left + len(digit)] = digit / 255
        pictures = (dark + opaque * (bright - dark)).round().to(torch.uint8)
        super().__init__(pictures, labels, "coloured digit")


def source(size=32, strength=1.0, crop=None, seed=0):
    """scikit-learn's digits, coloured."""
    digits = datasets.load_digits()
    train = ColouredDigits(*digits[:2], size, seed=2 * seed)
    test = ColouredDigits(*digits[2:], size, seed=2 * seed + 1)
    return data.photo_source(train, test, list("0123456789"), size, strength, crop=crop)
