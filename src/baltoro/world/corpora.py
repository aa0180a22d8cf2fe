"""Real text that every Python carries: the language's documentation and its standard library's source, and the
metadata of the installed packages (held out: it never takes part in training)."""

import importlib.metadata
import random
import re
import sysconfig
from dataclasses import dataclass
from email.message import EmailMessage
from functools import cache
from pathlib import Path
from typing import cast

from baltoro.world.document import Document

FIELDS = ("Version", "License", "Requires-Python")
_SHOWN = (*FIELDS, "Summary", "Author", "Maintainer", "Home-page")
_LABELS = {"License-Expression": "License"}


@dataclass(frozen=True)
class Corpus:
    """Real text in a few long pieces; each piece is drawn from equally often."""

    pieces: tuple[str, ...]

    def passage(self, rng: random.Random, characters: int) -> str:
        """About that many characters, cut at line boundaries where there are any."""
        text = rng.choice(self.pieces)
        start = rng.randrange(max(1, len(text) - characters))
        lines = text[start : start + characters].split("\n")
        return "\n".join(lines[1:] if len(lines) > 2 else lines)


@cache
def python_corpus() -> Corpus:
    """English and code that every Python carries: its reference documentation (about 0.7 MB) and the source of its
    standard library's top-level modules (at most 3 MB)."""
    from pydoc_data.topics import topics

    documentation = {str(key): str(text) for key, text in topics.items()}
    english = "\n".join(documentation[key] for key in sorted(documentation))
    return Corpus((english, _code()))


@cache
def _code() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.glob("*.py") if not p.name.startswith("_"))
    if not files:
        raise FileNotFoundError(f"{root}: no standard library sources; install Python with its library")
    return "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in files)[:3_000_000]


def folder_corpus(folder: Path) -> Corpus:
    """Every readable text file (.txt, .md, .rst, .py) below `folder`, in the order of their paths."""
    if not folder.is_dir():
        raise FileNotFoundError(f"corpus folder {folder} does not exist; correct corpus= or leave it out")
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".md", ".rst", ".py") and p.is_file())
    text = "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in files)
    if len(text) < 10_000:
        raise ValueError(f"corpus folder {folder} holds less than 10 kB of .txt, .md, .rst or .py; add text to it")
    return Corpus((text,))


@cache
def words() -> tuple[str, ...]:
    """Lower-case words and identifiers of the standard library, 3 to 9 letters, sorted."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{3,9}\b", _code()))))


@dataclass(frozen=True)
class PackageRecord:
    name: str
    values: dict[str, str]
    document: Document


def installed_packages() -> list[PackageRecord]:
    """Distributions on this machine whose metadata has all of FIELDS in one short line each, sorted by name.

    The document holds the metadata's own header lines, in their order, without the description; lines over 80
    characters are cut, as a page reader does.
    """
    seen: set[str] = set()
    found: list[tuple[str, dict[str, str], str]] = []
    for dist in importlib.metadata.distributions():
        message = cast(EmailMessage, dist.metadata)  # what it is, though the protocol does not say so
        header = [(_LABELS.get(key, key), str(value).split("\n")[0].strip()) for key, value in message.items()]
        # Of two lines with one label the last is the newer form (License, then License-Expression).
        first = {label: value for label, value in header if value}
        name = first.get("Name", "")
        if name.lower() in seen:  # hidden by the one that stands earlier on the path, as for import
            continue
        seen.add(name.lower())
        values = {label: first.get(label, "") for label in FIELDS}
        if name and all(value and len(value) <= 40 for value in values.values()):
            lines = [name, *(f"|{label}={value[:80]}" for label, value in first.items() if label in _SHOWN)]
            found.append((name, values, "\n".join(lines)))
    found.sort(key=lambda record: record[0].lower())
    return [PackageRecord(name, values, Document(name, name, (page,))) for name, values, page in found]
