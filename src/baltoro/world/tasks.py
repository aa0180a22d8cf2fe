"""Agent tasks on a world, each with its gold answer: wide search, deep search."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from baltoro.world.entities import PACKAGE_FIELDS, Entity, World
from baltoro.world.names import ATTRIBUTES

Table = dict[str, dict[str, str]]
"""Row name -> column -> value."""


@dataclass(frozen=True)
class WideSearch:
    """A table of N entities by M attributes. `columns` are asked for in this order."""

    names: tuple[str, ...]
    columns: tuple[str, ...]
    gold: Table

    @property
    def prompt(self) -> str:
        """Says what is wanted, and nothing of how to go about it."""
        return "\n".join((f"Find {template('name', self.columns)}", *listed(self.names)))


def wide_search(rng: random.Random, world: World, low: int, high: int, columns: tuple[int, int] = (2, 3)) -> WideSearch:
    """N in [low, high] entities of one kind, M in `columns` of their attributes."""
    kind = rng.choice(world.kinds)
    picked: list[Entity] = rng.sample(kind.entities, min(rng.randint(low, high), len(kind.entities)))
    keys = tuple(rng.sample(kind.keys, rng.randint(*columns)))
    gold = {entity.name: {key: entity.attributes[key] for key in keys} for entity in picked}
    return WideSearch(tuple(gold), keys, gold)


_CIRCLED = (("①", "⑳"), ("㉑", "㉟"), ("㊱", "㊿"))
_ALL_LABELS = "".join(chr(code) for first, last in _CIRCLED for code in range(ord(first), ord(last) + 1))
LABELS = _ALL_LABELS[:20]
"""Those that a small tokenizer is taught, a token each."""
COLUMNS = tuple(f"|{key}" for key in (*ATTRIBUTES, *PACKAGE_FIELDS))
"""What the cells of rows and the lines of pages begin with."""


def label(number: int) -> str:
    """What row `number` of a list or a table begins with, wherever it stands: a circled number. It is one token, and no
    letters join it, so that the name behind it is the same tokens as elsewhere."""
    most = len(_ALL_LABELS)
    if not 1 <= number <= most:
        raise ValueError(
            f"no label for row {number}: a table has at most {most - 1} rows, and the label that closes it"
        )
    return _ALL_LABELS[number - 1]


def subtask(number: int, name: str, left: int) -> str:
    """A line of a task's list: label, name, and how many rows are still to come, this one included. An orchestrator
    gives such a line to a subagent as it stands; so it sees the last by copying it, and need not count."""
    return template(f"{label(number)}{name}", [str(left)])


def listed(names: Sequence[str]) -> list[str]:
    """The list of a task, a subtask for each name."""
    return [subtask(number, name, len(names) + 1 - number) for number, name in enumerate(names, 1)]


def closed(rows: Sequence[str]) -> str:
    """Rows, which have their labels, and the next label with nothing behind it: the task's list has no such label, so
    the table ends there by looking it up, and not by counting."""
    return "\n".join((*rows, label(len(rows) + 1)))


def template(name: str, columns: Sequence[str]) -> str:
    """A row to be filled in: `name|column|column`."""
    return "|".join((name, *columns))


def row(number: int, name: str, values: dict[str, str], columns: Sequence[str]) -> str:
    """One line of a table: `②name|column=value|column=value`. Sign and word are one token: so what follows a column
    follows it in the page as well: a value is found by its column alone, and a row goes on by its last two tokens."""
    return label(number) + name + "".join(f"|{column}={values[column]}" for column in columns)
