"""Handwritten digits: scikit-learn's copy of the UCI test set of optical digits, 1,797 pictures of 8 x 8.

Splits. The first half of the pictures trains, the second half (898) is held out, as in scikit-learn's own example.
"""

import functools
import random
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from baltoro.chat.messages import Image
from baltoro.world.scenes import Split, canvas

_SIDES = (32, 48)


@dataclass(frozen=True)
class Digit:
    """Picture number `index` of the data set and the digit it shows."""

    index: int
    value: int

    def render(self, rng: random.Random) -> Image:
        """Enlarged three to six times, placed anywhere; dark on light or light on dark."""
        side = rng.choice(_SIDES)
        drawn = rng.randint(side * 3 // 4, side)
        left, top = rng.randint(0, side - drawn), rng.randint(0, side - drawn)
        pixels = canvas(side, side, (0, 0, 0))
        pixels[top : top + drawn, left : left + drawn] = enlarged(self.index, drawn)[:, :, None]
        return Image(255 - pixels if rng.random() < 0.5 else pixels)


def sample_digit(rng: random.Random, split: Split) -> Digit:
    pictures, values = _digits()
    half = (len(pictures) + 1) // 2
    index = rng.randrange(half) if split == "train" else rng.randrange(half, len(pictures))
    return Digit(index, int(values[index]))


def enlarged(index: int, side: int) -> NDArray[np.uint8]:
    """Ink of one picture, [side, side], bilinear."""
    picture = PillowImage.fromarray(_digits()[0][index])
    return np.asarray(picture.resize((side, side), PillowImage.Resampling.BILINEAR))


@functools.cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [1797, 8, 8] with ink in 0..255, and their digits [1797]."""
    # Imported here: it takes a second, and only this family needs it.
    from sklearn import datasets  # pyright: ignore[reportMissingTypeStubs]

    data = cast(Any, datasets.load_digits())  # pyright: ignore[reportUnknownMemberType]
    images: NDArray[np.float64] = data.images
    return np.round(images * (255 / 16)).astype(np.uint8), data.target
