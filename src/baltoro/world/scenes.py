"""Still scenes: plain shapes on a plain ground, with exact boxes, points and outlines.

Coordinates in text are integers 0..31, in 32nds of the picture's width and height, from the top left corner.

Splits. Every object is an entity (colour, shape, cell, ground), the cell being that of its middle in a 3 x 3 division
of the picture; `held_out` keeps one or two cells of each (colour, shape, ground). A training scene has no held-out
object, a held-out scene no other.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from baltoro.chat.messages import Image

Split = Literal["train", "heldout"]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (215, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 225),
    "yellow": (245, 220, 40),
    "purple": (150, 50, 190),
    "orange": (250, 135, 20),
    "cyan": (60, 205, 225),
}
SHAPES = ("circle", "square", "triangle", "cross")
GROUNDS: tuple[Colour, ...] = ((14, 16, 22), (70, 72, 78), (240, 240, 236))

COLOUR_NAMES = tuple(COLOURS)
GRID = 32
CELLS = 3
GAP = 2
"""Free pixels between two objects, and between an object and the picture's edge."""


def held_out(*features: int) -> bool:
    """The rule that divides combinations of feature indices: one in seven, as in a Latin square. With one in three,
    what is never seen of a colour in a place tells more of a shape than its outline: held-out answers come out worse
    than chance."""
    return sum(features) % 7 == 0


def in_split(split: Split, *features: int) -> bool:
    return held_out(*features) == (split == "heldout")


def grid(pixel: float, extent: int) -> int:
    """Pixel position along an axis of `extent` pixels, in 32nds, the last edge included: 0..31."""
    return min(GRID - 1, round(pixel * GRID / extent))


@dataclass(frozen=True)
class Thing:
    """One object; (x, y) is its top left pixel, `size` its side in pixels, `paint` a shade of its colour."""

    colour: str
    shape: str
    x: int
    y: int
    size: int
    paint: Colour

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def clear_of(self, other: "Thing") -> bool:
        return (
            self.x >= other.x + other.size + GAP
            or other.x >= self.x + self.size + GAP
            or self.y >= other.y + other.size + GAP
            or other.y >= self.y + self.size + GAP
        )


@dataclass(frozen=True)
class Scene:
    """Things that do not touch, in reading order, on a ground; width and height in pixels."""

    width: int
    height: int
    ground: Colour
    things: tuple[Thing, ...]

    def box(self, thing: Thing) -> list[int]:
        """x0, y0, x1, y1 in 32nds."""
        return [
            grid(thing.x, self.width),
            grid(thing.y, self.height),
            grid(thing.x + thing.size, self.width),
            grid(thing.y + thing.size, self.height),
        ]

    def point(self, thing: Thing) -> list[int]:
        """The middle of the box, in 32nds; inside the object for every shape."""
        return [grid(thing.x + thing.size / 2, self.width), grid(thing.y + thing.size / 2, self.height)]

    def outline(self, thing: Thing) -> list[int]:
        """Vertices x y x y ... in 32nds, clockwise from the top (triangle) or the top left (square)."""
        x0, y0, x1, y1 = self.box(thing)
        if thing.shape == "triangle":
            return [self.point(thing)[0], y0, x1, y1, x0, y1]
        assert thing.shape == "square", thing.shape
        return [x0, y0, x1, y0, x1, y1, x0, y1]

    def caption(self) -> str:
        return "; ".join(f"{thing.name} {' '.join(map(str, self.box(thing)))}" for thing in self.things)

    def render(self) -> Image:
        pixels = canvas(self.width, self.height, self.ground)
        for thing in self.things:
            draw(pixels, thing)
        return Image(pixels)


def canvas(width: int, height: int, ground: Colour) -> NDArray[np.uint8]:
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = ground
    return pixels


def draw(pixels: NDArray[np.uint8], thing: Thing) -> None:
    """Paints the thing into pixels [height, width, 3]."""
    region = pixels[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
    region[stencil(thing.shape, thing.size)] = thing.paint


@functools.cache
def stencil(shape: str, size: int) -> NDArray[np.bool_]:
    """Which pixels of its size x size box a shape covers."""
    centre = np.arange(size) + 0.5 - size / 2
    across, down = centre[None, :], centre[:, None]
    if shape == "circle":
        return across**2 + down**2 <= (size / 2) ** 2
    if shape == "triangle":
        return np.abs(across) <= (down + size / 2 + 0.5) / 2
    if shape == "cross":
        arm = size / 6
        return (np.abs(across) <= arm) | (np.abs(down) <= arm)
    assert shape == "square", shape
    return np.ones((size, size), dtype=np.bool_)


def vary(rng: random.Random, colour: str) -> Colour:
    """A shade of the named colour that nobody would name otherwise."""
    red, green, blue = COLOURS[colour]
    shift = rng.randint(-14, 14)
    return _byte(red + shift), _byte(green + shift), _byte(blue + shift)


def _byte(value: int) -> int:
    return min(255, max(0, value))


_OPEN_CELLS: dict[tuple[Split, str, str, Colour], list[tuple[int, int]]] = {
    (split, colour, shape, ground): [
        divmod(cell, CELLS) for cell in range(CELLS * CELLS) if in_split(split, c, s, cell, g)
    ]
    for split in ("train", "heldout")
    for c, colour in enumerate(COLOUR_NAMES)
    for s, shape in enumerate(SHAPES)
    for g, ground in enumerate(GROUNDS)
}

SMALLEST = 16
"""Least side of an object, in pixels."""


@dataclass(frozen=True)
class Room:
    """Sides a picture may have, in pixels, and the largest object as a share of the shorter side."""

    sides: tuple[int, ...]
    share: float


ALONE = Room((32, 48, 64), 1 / 2)
FEW = Room((48, 64), 1 / 3)
CROWD = Room((64, 80), 1 / 4)


def place(rng: random.Random, split: Split, room: Room, kinds: Sequence[tuple[str, str]]) -> Scene | None:
    """Puts objects of the given (colour, shape) kinds into cells that belong to the split; None if they do not fit."""
    width, height, ground = rng.choice(room.sides), rng.choice(room.sides), rng.choice(GROUNDS)
    largest = int(min(width, height) * room.share)
    things: list[Thing] = []
    for colour, shape in kinds:
        paint = vary(rng, colour)
        for _ in range(12):
            row, column = rng.choice(_OPEN_CELLS[split, colour, shape, ground])
            size = rng.randint(SMALLEST, largest)
            x, y = _start(rng, column, size, width), _start(rng, row, size, height)
            thing = Thing(colour, shape, x, y, size, paint)
            if all(thing.clear_of(other) for other in things):
                things.append(thing)
                break
        else:
            return None
    things.sort(key=lambda thing: (thing.y + thing.size // 2, thing.x))
    return Scene(width, height, ground, tuple(things))


def _start(rng: random.Random, cell: int, size: int, extent: int) -> int:
    """A first pixel that puts the middle of an object of `size` pixels into the cell, GAP away from the edges."""
    low = max(GAP, math.ceil(extent * cell / CELLS - size / 2))
    high = min(extent - GAP - size, math.ceil(extent * (cell + 1) / CELLS - size / 2) - 1)
    return rng.randint(low, high)


def cell_of(scene: Scene, thing: Thing) -> tuple[int, int]:
    """Row and column of the cell that holds the thing's middle."""
    middle = thing.size / 2
    return int((thing.y + middle) * CELLS / scene.height), int((thing.x + middle) * CELLS / scene.width)
