"""Bar charts of three or four coloured bars, heights 1 to 9 over lines at 0, 3, 6 and 9.

Splits. Every bar is an entity (colour, height, slot), divided by `held_out`; a chart has bars of one split only.
"""

import random
from dataclasses import dataclass

from baltoro.chat.messages import Image
from baltoro.world.scenes import COLOUR_NAMES, Colour, Split, canvas, in_split, vary

MAX_HEIGHT = 9
_LINE_EVERY = 3
_SLOT_WIDTH = 16
_BAR_WIDTH = 12
_STEPS = {48: 4, 64: 6, 80: 8}
"""Pixels per unit of a bar's height, by the picture's height."""
_LOOKS: tuple[tuple[Colour, Colour], ...] = (((14, 16, 22), (62, 64, 70)), ((240, 240, 236), (196, 196, 192)))
"""Ground and line colours."""


@dataclass(frozen=True)
class Bar:
    colour: str
    height: int


@dataclass(frozen=True)
class Chart:
    """Bars from left to right in different colours and heights."""

    bars: tuple[Bar, ...]

    @property
    def tallest(self) -> Bar:
        return max(self.bars, key=lambda bar: bar.height)

    @property
    def lowest(self) -> Bar:
        return min(self.bars, key=lambda bar: bar.height)

    def caption(self) -> str:
        return "bars " + " ".join(f"{bar.colour} {bar.height}" for bar in self.bars)

    def render(self, rng: random.Random) -> Image:
        height, step = rng.choice(tuple(_STEPS.items()))
        ground, line = rng.choice(_LOOKS)
        pixels = canvas(_SLOT_WIDTH * len(self.bars), height, ground)
        floor = (height + MAX_HEIGHT * step) // 2
        pixels[floor - MAX_HEIGHT * step : floor + 1 : _LINE_EVERY * step] = line
        for slot, bar in enumerate(self.bars):
            left = slot * _SLOT_WIDTH + (_SLOT_WIDTH - _BAR_WIDTH) // 2
            pixels[floor - bar.height * step : floor, left : left + _BAR_WIDTH] = vary(rng, bar.colour)
        return Image(pixels)


def sample_chart(rng: random.Random, split: Split) -> Chart:
    colours = rng.sample(range(len(COLOUR_NAMES)), rng.choice((3, 4)))
    bars: list[Bar] = []
    for slot, colour in enumerate(colours):
        taken = {bar.height for bar in bars}
        free = [h for h in range(1, MAX_HEIGHT + 1) if h not in taken and in_split(split, colour, h, slot)]
        if not free:  # a held-out colour and slot have one height or two, and the bars before may have them
            return sample_chart(rng, split)
        bars.append(Bar(COLOUR_NAMES[colour], rng.choice(free)))
    return Chart(tuple(bars))
