"""Clips of one shape: it moves (4 frames), or it appears, vanishes or changes colour (8 frames at 1 fps).

Splits. Motion: the entity is (colour, shape, ground, direction). Event: the entity is (colour, shape, kind, second).
`held_out` divides both.
"""

import random
from dataclasses import dataclass

import numpy as np

from baltoro.chat.messages import Clip
from baltoro.world.scenes import COLOUR_NAMES, GAP, GROUNDS, SHAPES, Colour, Split, Thing, canvas, draw, in_split, vary

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EVENTS = ("appears", "vanishes", "changes")
EVENT_FRAMES = 8

_SIDE = 48
_MOTION_FRAMES = 4
_MOTION_FPS = 4.0
_EVENT_FPS = 1.0


@dataclass(frozen=True)
class Motion:
    """One shape that moves steadily in one of DIRECTIONS."""

    colour: str
    shape: str
    ground: Colour
    direction: str

    def caption(self) -> str:
        return f"{self.colour} {self.shape} moves {self.direction}"

    def render(self, rng: random.Random) -> Clip:
        size, speed = rng.randint(14, 18), rng.randint(6, 8)
        across, down = DIRECTIONS[self.direction]
        path = speed * (_MOTION_FRAMES - 1)
        x, y = _first(rng, across * path, size), _first(rng, down * path, size)
        paint = vary(rng, self.colour)
        frames = np.stack([canvas(_SIDE, _SIDE, self.ground)] * _MOTION_FRAMES)
        for t, frame in enumerate(frames):
            draw(frame, Thing(self.colour, self.shape, x + across * speed * t, y + down * speed * t, size, paint))
        return Clip(frames, _MOTION_FPS)


def sample_motion(rng: random.Random, split: Split) -> Motion:
    names = tuple(DIRECTIONS)
    while True:
        colour, shape = rng.randrange(len(COLOUR_NAMES)), rng.randrange(len(SHAPES))
        ground, direction = rng.randrange(len(GROUNDS)), rng.randrange(len(names))
        if in_split(split, colour, shape, ground, direction):
            return Motion(COLOUR_NAMES[colour], SHAPES[shape], GROUNDS[ground], names[direction])


@dataclass(frozen=True)
class Event:
    """What happens to a resting shape at `second`, the first frame that differs; `colour` is the one it has before
    (or, if it appears, then), `into` the one that it changes to."""

    colour: str
    shape: str
    kind: str
    second: int
    into: str

    def caption(self) -> str:
        what = f"changes to {self.into}" if self.kind == "changes" else self.kind
        return f"{self.colour} {self.shape} {what} at {self.second}"

    def render(self, rng: random.Random) -> Clip:
        size = rng.randint(16, 24)
        x, y = _first(rng, 0, size), _first(rng, 0, size)
        ground = rng.choice(GROUNDS)
        first = Thing(self.colour, self.shape, x, y, size, vary(rng, self.colour))
        then = Thing(self.into, self.shape, x, y, size, vary(rng, self.into))
        before = None if self.kind == "appears" else first
        after = {"appears": first, "vanishes": None, "changes": then}[self.kind]
        frames = np.stack([canvas(_SIDE, _SIDE, ground)] * EVENT_FRAMES)
        for t, frame in enumerate(frames):
            shown = before if t < self.second else after
            if shown is not None:
                draw(frame, shown)
        return Clip(frames, _EVENT_FPS)


def sample_event(rng: random.Random, split: Split) -> Event:
    while True:
        colour, into = rng.sample(range(len(COLOUR_NAMES)), 2)
        shape, kind = rng.randrange(len(SHAPES)), rng.randrange(len(EVENTS))
        second = rng.randrange(1, EVENT_FRAMES)
        if in_split(split, colour, shape, kind, second):
            return Event(COLOUR_NAMES[colour], SHAPES[shape], EVENTS[kind], second, COLOUR_NAMES[into])


def _first(rng: random.Random, path: int, size: int) -> int:
    """A first position on one axis from which a move by `path` pixels stays GAP away from the edges."""
    return rng.randint(GAP - min(0, path), _SIDE - GAP - size - max(0, path))
