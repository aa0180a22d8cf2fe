"""A world of entities with attributes, and their pages; gold answers by construction.

A world is a pure function of its seed and split. Entities of one kind have the same attributes; every page shows them
in an order of its own. Facts differ from world to world, so nothing can be learned by heart: answers must be looked up.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from baltoro.world.corpora import python_corpus, words
from baltoro.world.document import Document
from baltoro.world.names import ATTRIBUTES, COLOURS, WORDS, Split, package_name, person_name

LICENSES = (
    *("MIT", "BSD-3-Clause", "Apache-2.0", "BSD", "BSD-2-Clause", "ISC", "MPL-2.0", "LGPL", "PSF-2.0", "Unlicense"),
    *("Apache Software License", "BSD 3-Clause License", "MIT License", "Apache 2.0", "GPLv3+", "Zlib", "CC0-1.0"),
)
PACKAGE_FIELDS = ("Version", "License", "Requires-Python")
# Kinds of people among a world's four. In training half are packages: their values are of many tokens and alike in many
# rows, which takes more practice to copy.
_PEOPLE: dict[Split, int] = {"train": 2, "heldout": 3}
_PYTHONS = ("3", "3.6", "3.7", "3.8", "3.9", "3.10", "3.11", "3.12", "3.8.1", "3.9.0", "2.7")


@dataclass(frozen=True)
class Entity:
    name: str
    attributes: dict[str, str]

    @property
    def page(self) -> str:
        """Its name, then one attribute a line: `|key=value`."""
        return "\n".join([self.name, *(f"|{key}={value}" for key, value in self.attributes.items())])


@dataclass(frozen=True)
class Kind:
    """Entities that can stand in one table: they all have every attribute of `keys`."""

    keys: tuple[str, ...]
    entities: tuple[Entity, ...]


class World:
    """Four `kinds` of entities, people before packages, and their pages; a page's url is its entity's name."""

    def __init__(self, seed: int, split: Split, per_kind: int = 20):
        rng = random.Random(f"world {seed} {split}")
        self.kinds: list[Kind] = []
        taken: set[str] = set()
        for number in range(4):
            people = number < _PEOPLE[split]
            keys = tuple(rng.sample(ATTRIBUTES, 5)) if people else PACKAGE_FIELDS
            entities: list[Entity] = []
            while len(entities) < per_kind:
                name = person_name(rng, split) if people else package_name(rng, split, words())
                if name not in taken:
                    taken.add(name)
                    entities.append(_person(rng, name, keys) if people else _package(rng, name))
            self.kinds.append(Kind(keys, tuple(entities)))
        pages = [entity for kind in self.kinds for entity in kind.entities]
        rng.shuffle(pages)
        self.documents = [Document(entity.name, entity.name, (entity.page,)) for entity in pages]


def _person(rng: random.Random, name: str, keys: Sequence[str]) -> Entity:
    shown = list(keys)
    rng.shuffle(shown)
    return Entity(name, {key: _value(rng, key) for key in shown})


def _value(rng: random.Random, key: str) -> str:
    if key == "colour":
        return rng.choice(COLOURS)
    if key in ("age", "code"):
        return str(rng.randrange(10, 100))
    return rng.choice(WORDS)


def _package(rng: random.Random, name: str) -> Entity:
    """An invented software package: its page looks like real metadata and is made of real words."""
    vocabulary = words()
    values = {
        "Version": _version(rng),
        "Summary": python_corpus().passage(rng, 200).replace("\n", " ").strip()[:50].strip() or "A package",
        "Home-page": f"https://{rng.choice(vocabulary)}.{rng.choice(('org', 'com', 'io'))}/{rng.choice(vocabulary)}",
        "Author": f"{rng.choice(vocabulary).capitalize()} {rng.choice(vocabulary).capitalize()}",
        "License": _license(rng),
        "Requires-Python": _pythons(rng),
    }
    keys = [key for key in values if key in PACKAGE_FIELDS or rng.random() < 0.4]
    if rng.random() < 0.3:
        rng.shuffle(keys)
    return Entity(name, {key: values[key] for key in keys})


def _version(rng: random.Random) -> str:
    if rng.random() < 0.15:  # by the calendar
        parts = [rng.randint(2010, 2040), rng.randint(1, 12), rng.randint(1, 31)][: rng.choice((2, 3, 3))]
    else:
        parts = [rng.randrange(rng.choice((4, 30, 100))) for _ in range(rng.choice((2, 3, 3, 3, 3, 4)))]
    suffix = rng.choice((".post1", "rc1", "b2", ".post3")) if rng.random() < 0.05 else ""
    return ".".join(map(str, parts)) + suffix


def _license(rng: random.Random) -> str:
    first, second, third = rng.sample(LICENSES, 3)
    form = rng.random()
    if form < 0.75:
        return first
    if form < 0.9:
        return f"{first} {rng.choice(('AND', 'OR'))} {second}"
    if form < 0.95:
        return f"{first} AND ({second} OR {third})"
    return f"{rng.choice(words()).capitalize()} {rng.choice(('License', 'Software License', 'Public License'))}"


def _pythons(rng: random.Random) -> str:
    lowest = f">={rng.choice(_PYTHONS)}"
    if rng.random() < 0.8:
        return lowest
    others = (f"<{rng.randint(4, 5)}.0", f"!=3.{rng.randrange(12)}.*", f"!=3.{rng.randrange(12)}.{rng.randrange(8)}")
    bounds = [lowest, rng.choice(others)]
    rng.shuffle(bounds)
    return rng.choice((",", ", ")).join(bounds)
