"""Rendered text: one to three invented stems, in several fonts that matplotlib brings along, on one line or more.

Splits. The entity is the ordered pair of stems in a font; `held_out` divides them, and none of one split occurs in the
other. Were it the pair alone, a stem would be known not to follow another, and held-out texts be read worse than
guessed. A third of the training texts are one stem alone and a third are three below each other, so that they can be
read part by part instead of being learned by heart.
"""

import functools
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from baltoro.chat.messages import Image
from baltoro.world.scenes import COLOUR_NAMES, COLOURS, Colour, Split, canvas, in_split

STEMS = (
    "bal", "cor", "dun", "fex", "gim", "hab", "jol", "kes",
    "lum", "mip", "nav", "pog", "ruk", "sel", "tav", "vor",
)  # fmt: skip
_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
_PIXELS = (18, 20)
_PAD = 3
_DARK: Colour = (14, 16, 22)
_LIGHT: Colour = (240, 240, 236)
_DARK_INKS = ("red", "blue", "green", "purple")
"""Inks that read well on the light ground; the dark ground takes any colour but these."""


@dataclass(frozen=True)
class Lettering:
    """`lines` from top to bottom; the text is read with one space between lines."""

    lines: tuple[str, ...]
    font: str

    @property
    def text(self) -> str:
        return " ".join(self.lines)

    def render(self, rng: random.Random) -> Image:
        pixels_high = rng.choice(_PIXELS)
        stamps = [ink(line, self.font, pixels_high) for line in self.lines]
        width = _multiple(max(stamp.shape[1] for stamp in stamps) + 2 * _PAD)
        height = _multiple(sum(stamp.shape[0] for stamp in stamps) + 2 * _PAD)
        dark = rng.random() < 0.5
        ground = _DARK if dark else _LIGHT
        names = [name for name in COLOUR_NAMES if (name in _DARK_INKS) != dark]
        colour = np.array(rng.choice([_LIGHT if dark else _DARK, *(COLOURS[name] for name in names)]), dtype=np.float32)
        pixels = canvas(width, height, ground)
        left = rng.randint(_PAD, width - _PAD - max(stamp.shape[1] for stamp in stamps))
        top = rng.randint(_PAD, height - _PAD - sum(stamp.shape[0] for stamp in stamps))
        for stamp in stamps:
            rows, columns = stamp.shape
            region = pixels[top : top + rows, left : left + columns]
            region[:] = region + stamp[:, :, None] * (colour - region)
            top += rows
        return Image(pixels)


def sample_lettering(rng: random.Random, split: Split) -> Lettering:
    stems = rng.choice((1, 2, 3)) if split == "train" else 2
    while True:
        font = rng.randrange(len(_FONTS))
        drawn = [rng.randrange(len(STEMS)) for _ in range(stems)]
        if all(in_split(split, *pair, font) for pair in itertools.pairwise(drawn)):
            lines = tuple(STEMS[stem] for stem in drawn)
            beside = stems == 2 and rng.random() < 0.5
            return Lettering((" ".join(lines),) if beside else lines, _FONTS[font])


@functools.cache
def _font(name: str, pixels_high: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), pixels_high)


@functools.lru_cache(maxsize=16384)
def ink(text: str, font: str, pixels_high: int) -> NDArray[np.float32]:
    """Coverage in 0..1 of one line, [line height, width]; every text of a font and size has the same height."""
    face = _font(font, pixels_high)
    ascent, descent = face.getmetrics()
    picture = PillowImage.new("L", (round(face.getlength(text)) + 1, ascent + descent))
    ImageDraw.Draw(picture).text((0, 0), text, fill=255, font=face)
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def _multiple(pixels: int) -> int:
    """Up to the next multiple of 16."""
    return -(-pixels // 16) * 16
