"""Real text that every Python carries: the language's documentation and its standard library's source, and the
metadata of the installed packages (held out: it never takes part in training)."""

import importlib.metadata
import importlib.resources
import random
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from baltoro.world.document import Document

FIELDS = ("Version", "License", "Requires-Python")


@cache
def english() -> str:
    """The running Python's own reference documentation (about 0.7 MB)."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


@cache
def code() -> str:
    """Source of the standard library's top-level modules, without tests and data, at most 3 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.glob("*.py") if not p.name.startswith("_"))
    if not files:
        raise FileNotFoundError(f"{root}: no standard library sources; install Python with its library")
    return "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in files)[:3_000_000]


@cache
def words() -> tuple[str, ...]:
    """Lower-case words and identifiers of the standard library, 3 to 9 letters, sorted."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{3,9}\b", code()))))


def passage(rng: random.Random, characters: int) -> str:
    """A piece of real documentation or code, cut at line boundaries."""
    text = english() if rng.random() < 0.5 else code()
    start = rng.randrange(len(text) - characters)
    lines = text[start : start + characters].split("\n")
    return "\n".join(lines[1:] if len(lines) > 2 else lines)


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
    records: dict[str, PackageRecord] = {}
    for dist in importlib.metadata.distributions():
        meta = dist.metadata
        name = meta["Name"]
        values = {field: (meta[field] or "").strip() for field in FIELDS}
        values["License"] = (meta["License-Expression"] or values["License"] or "").strip()
        if not name or any(not v or "\n" in v or len(v) > 40 for v in values.values()):
            continue
        lines = [name]
        seen: set[str] = set()
        for key, value in meta.items():
            label = "License" if key == "License-Expression" else key
            first = str(value).split("\n")[0][:80]
            keep = label in FIELDS or label in ("Summary", "Author", "Home-page", "Maintainer")
            if keep and first and label not in seen and not (label == "License" and first != values["License"]):
                seen.add(label)
                lines.append(f"{label}: {first}")
        records[name.lower()] = PackageRecord(name, values, Document(f"{len(records) + 100}", name, ("\n".join(lines),)))
    return [records[key] for key in sorted(records)]
