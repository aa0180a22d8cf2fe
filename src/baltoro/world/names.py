"""Invented names and values. The split is a property of the name itself, so that training and held-out worlds never
share an entity: a name belongs to the held-out world when its CRC-32 is 0 modulo 10."""

import random
import zlib
from collections.abc import Callable
from typing import Literal

Split = Literal["train", "heldout"]

_HEADS = ("Bel", "Dor", "Fen", "Gal", "Hul", "Jor", "Kas", "Lem", "Mir", "Nor", "Pel", "Vel")
_TAILS = ("an", "eth", "is", "ok", "um", "ara", "ix", "oy")
FIRST = tuple(head + tail for head in _HEADS for tail in _TAILS)
LAST = tuple(
    head + tail
    for head in ("Bran", "Cald", "Dusk", "Frost", "Grim", "Holt", "Lark", "Moss", "Thorn", "Wick", "Stan", "Rud")
    for tail in ("ford", "gate", "mere", "well", "ton", "by", "low", "wood")
)
WORDS = tuple(
    head + tail
    for head in ("ab", "cor", "del", "fal", "gri", "lum", "mo", "pra", "sel", "tu", "vor", "zin")
    for tail in ("nel", "dit", "ka", "rus", "pom", "sat", "vey", "min")
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
ATTRIBUTES = (
    "capital",
    "river",
    "metal",
    "bird",
    "dish",
    "sport",
    "colour",
    "age",
    "code",
    "mayor",
    "tree",
    "stone",
)


def split_of(name: str) -> Split:
    return "heldout" if zlib.crc32(name.encode()) % 10 == 0 else "train"


def draw(make: Callable[[], str], split: Split) -> str:
    """The first name from `make` that belongs to `split`."""
    while True:
        name = make()
        if split_of(name) == split:
            return name


def person_name(rng: random.Random, split: Split) -> str:
    return draw(lambda: f"{rng.choice(FIRST)} {rng.choice(LAST)}", split)


def package_name(rng: random.Random, split: Split, words: tuple[str, ...]) -> str:
    """A name in the manner of software packages, from real words: `socket-parser`, `py_thread2`."""

    def make() -> str:
        parts = [rng.choice(words) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        style = rng.random()
        if style < 0.15:
            parts = [part.capitalize() for part in parts]
        elif style < 0.25:
            parts[0] = rng.choice(("py", "Py", "lib")) + parts[0]
        name = rng.choice(("-", "-", "_", ".")).join(parts) if style > 0.05 else "".join(parts)
        return name + (str(rng.randrange(2, 10)) if rng.random() < 0.1 else "")

    return draw(make, split)
