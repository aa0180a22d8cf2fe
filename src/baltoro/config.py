"""One TOML run file -> one frozen dataclass. The dataclass is the schema; every departure is the user's mistake."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

T = TypeVar("T")


def load(path: Path, overrides: Sequence[str], schema: type[T]) -> T:
    """Reads `path` (TOML, or JSON as `dump` gives it), applies `key.sub=value` overrides (later ones win) and builds
    `schema`, a dataclass.

    An override's value is TOML (`seed=1`, `mix=[0.5, 0.5]`, `name="a b"`); what is not TOML is a string (`name=nano`).
    Raises ValueError, naming file and dotted key, for an unknown or missing key or a value of the wrong type.
    """
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        table: dict[str, Any] = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"run file {path} does not exist; give the path of a TOML run file") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid {kind}: {error}; correct the file") from None
    return _fill(schema, table, overrides, str(path))


def from_overrides(overrides: Sequence[str], schema: type[T]) -> T:
    """As `load`, of a file that says nothing."""
    return _fill(schema, {}, overrides, "settings")


def dump(config: object) -> dict[str, Any]:
    """A dataclass as JSON- and TOML-ready values: paths as strings, tuples as lists, fields that are None left out."""
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(cast(Any, config))
        if (value := getattr(config, field.name)) is not None
    }


def _fill(schema: type[T], table: dict[str, Any], overrides: Sequence[str], source: str) -> T:
    for override in overrides:
        _apply(table, override)
    try:
        return cast(T, _build(schema, table, ""))
    except _Mismatch as mismatch:
        raise ValueError(f"{source}: {mismatch}") from None


class _Mismatch(ValueError):
    """The table does not fit the schema."""


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return dump(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in cast(tuple[object, ...], value)]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast(dict[str, object], value).items()}
    return value


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ValueError(f"override {override!r} is not of the form key=value; write for example seed=1 or rl.steps=20")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    # A text with line breaks could smuggle in further keys: then it is no single TOML value either.
    value = parsed["value"] if parsed.keys() == {"value"} else text
    for depth, part in enumerate(parts[:-1], start=1):
        below = table.setdefault(part, {})
        if not isinstance(below, dict):
            outer = ".".join(parts[:depth])
            raise ValueError(f"override {override!r}: {outer} is a value, not a table; drop what follows it")
        table = cast(dict[str, Any], below)
    table[parts[-1]] = value


def _build(expected: Any, value: object, key: str) -> object:
    """`value` as the type `expected`; `key` is its dotted name for messages, "" at the root."""
    origin = typing.get_origin(expected)
    arguments = typing.get_args(expected)
    if dataclasses.is_dataclass(expected) and isinstance(value, dict):
        return _build_dataclass(cast(type[object], expected), cast(dict[str, object], value), key)
    if origin in (Union, types.UnionType):
        # TOML has no null: None is the default of an absent key, so a given value is of the other type.
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _build(inner, value, key)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _Mismatch(f"{key} is {value!r}; choose one of {', '.join(repr(choice) for choice in arguments)}")
    if origin is tuple and isinstance(value, list):
        items = cast(list[object], value)
        if arguments[-1] is Ellipsis:
            return tuple(_build(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(items))
        if len(items) != len(arguments):
            raise _Mismatch(f"{key} has {len(items)} items; give exactly {len(arguments)}")
        pairs = zip(arguments, items, strict=True)
        return tuple(_build(each, item, f"{key}[{i}]") for i, (each, item) in enumerate(pairs))
    if origin is dict and isinstance(value, dict):
        entries = cast(dict[str, object], value)
        return {name: _build(arguments[1], item, f"{key}.{name}") for name, item in entries.items()}
    if expected is Path and isinstance(value, str):
        return Path(value).expanduser()
    if expected is float and type(value) is int:
        return float(value)
    if expected in (bool, int, float, str) and type(value) is expected:
        return value
    given = _NAMES.get(type(value), "a date or time")
    raise _Mismatch(f"{key} is {given} ({value!r}); give {_describe(expected)}")


def _build_dataclass(schema: type[object], table: Mapping[str, object], key: str) -> object:
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, schema)) if field.init}
    prefix = f"{key}." if key else ""
    for name in table:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise _Mismatch(f"unknown key {prefix}{name}; {hint}")
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _Mismatch(f"key {prefix}{name} is missing; give {_describe(hints[name])}")
    values = {name: _build(hints[name], value, prefix + name) for name, value in table.items()}
    try:
        return schema(**values)
    except ValueError as error:  # a check across fields in __post_init__
        raise _Mismatch(f"{key}: {error}" if key else str(error)) from None


_NAMES: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "a table",
}


def _describe(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return _describe(next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple:
        return "an array"
    if expected is Path:
        return "a path (a string)"
    return "a table" if origin is dict or dataclasses.is_dataclass(expected) else _NAMES[expected]
