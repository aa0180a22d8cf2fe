"""JSON schemas of tools. The keywords that a declaration shows to the model (model.md section 12) are those that its
arguments are checked against; others are ignored, as JSON schema has it."""

import json
from collections.abc import Mapping
from typing import Any, cast

import regex

_Schema = Mapping[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_REFERENCE = "#/$defs/"
_PATTERN_SECONDS = 0.1  # patterns come from strangers, and some take exponential time


def check_schema(schema: object) -> None:
    """Raises ValueError, naming the place, unless every keyword has a value of its kind."""
    definitions = _object((_object(schema) or {}).get("$defs")) or {}
    _check_schema(schema, "parameters", {"#", *(_REFERENCE + name for name in definitions)})


def _check_schema(schema: object, path: str, references: set[str]) -> None:
    keywords = {} if isinstance(schema, bool) else _object(schema)
    if keywords is None:
        raise ValueError(f"{path} must be a JSON schema: an object or a boolean")
    for key, value in keywords.items():
        wanted = ""
        items = _array(value)
        match key:
            case "type":
                kinds = [value] if items is None else items
                if not kinds or any(not isinstance(kind, str) or kind not in _TYPES for kind in kinds):
                    wanted = f"one or several of {', '.join(_TYPES)}"
            case "properties" | "$defs":
                if (schemas := _object(value)) is None:
                    wanted = "an object"
                for name, below in (schemas or {}).items():
                    _check_schema(below, f"{path}.{key}.{name}", references)
            case "items" | "additionalProperties":
                _check_schema(value, f"{path}.{key}", references)
            case "anyOf":
                wanted = "" if items else "an array of schemas"
                for index, below in enumerate(items or ()):
                    _check_schema(below, f"{path}.{key}[{index}]", references)
            case "required":
                wanted = "" if items is not None and all(isinstance(i, str) for i in items) else "an array of strings"
            case "enum":
                wanted = "" if items else "an array of values"
            case "$ref":
                known = isinstance(value, str) and value in references
                wanted = "" if known else "# or #/$defs/name with a name that is defined"
            case "description":
                wanted = "" if isinstance(value, str) else "a string"
            case "pattern":
                wanted = "" if isinstance(value, str) and _compiles(value) else "a regular expression"
            case "minLength" | "maxLength" | "minItems" | "maxItems":
                wanted = "" if type(value) is int and value >= 0 else "an integer of at least 0"
            case "minimum" | "maximum":
                wanted = "" if type(value) in (int, float) else "a number"
            case _:
                pass
        if wanted:
            raise ValueError(f"{path}.{key} must be {wanted}")


def _object(value: object) -> dict[str, object] | None:
    return cast(dict[str, object], value) if isinstance(value, dict) else None


def _array(value: object) -> list[object] | None:
    return cast(list[object], value) if isinstance(value, list) else None


def _compiles(pattern: str) -> bool:
    try:
        regex.compile(pattern)
    except regex.error:
        return False
    return True


def parse_arguments(text: str, schema: _Schema) -> dict[str, object]:
    """The arguments of a call, checked against the tool's parameters. Raises ValueError with a text for the model."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("the arguments are not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError("arguments must be of type object")
    try:
        _check(cast(object, value), schema, "arguments", schema)
    except RecursionError:
        raise ValueError("the arguments are nested too deeply") from None
    return cast(dict[str, object], value)


def _check(value: object, schema: _Schema | bool, path: str, root: _Schema) -> None:
    """Raises ValueError naming the place and the fault."""
    if isinstance(schema, bool):
        if not schema:
            raise ValueError(f"{path} is not allowed")
        return
    if "$ref" in schema:
        target: str = schema["$ref"]
        named = root if target == "#" else root.get("$defs", {}).get(target.removeprefix(_REFERENCE), True)
        _check(value, named, path, root)
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], path, root)
    kind = schema.get("type")
    if kind is not None and not (isinstance(kind, str) and _is(value, kind)):
        kinds = cast(list[str], _array(kind) or [kind])
        if not any(_is(value, kind) for kind in kinds):
            raise ValueError(f"{path} must be of type {' or '.join(kinds)}")
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        raise ValueError(f"{path} must be one of {json.dumps(schema['enum'], ensure_ascii=False)}")
    if isinstance(value, str):
        _check_length(len(value), schema, "Length", path, "characters")
        if "pattern" in schema:
            _check_pattern(value, schema["pattern"], path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value):
            raise ValueError(f"{path} must be at least {schema['minimum']}")
        if value > schema.get("maximum", value):
            raise ValueError(f"{path} must be at most {schema['maximum']}")
    elif isinstance(value, list):
        items = cast(list[object], value)
        _check_length(len(items), schema, "Items", path, "items")
        for index, item in enumerate(items):
            _check(item, schema.get("items", True), f"{path}[{index}]", root)
    elif isinstance(value, dict):
        _check_fields(cast(dict[str, object], value), schema, path, root)


def _check_fields(fields: dict[str, object], schema: _Schema, path: str, root: _Schema) -> None:
    for key in schema.get("required", ()):
        if key not in fields:
            raise ValueError(f'{path} lacks "{key}"')
    properties: dict[str, _Schema | bool] = schema.get("properties", {})
    others: _Schema | bool = schema.get("additionalProperties", True)
    for key, item in fields.items():
        _check(item, properties.get(key, others), key if path == "arguments" else f"{path}.{key}", root)


def _check_any(value: object, options: list[_Schema | bool], path: str, root: _Schema) -> None:
    faults: list[str] = []
    for option in options:
        try:
            return _check(value, option, path, root)
        except ValueError as error:
            faults.append(str(error))
    raise ValueError("; or ".join(dict.fromkeys(faults)))


def _check_length(length: int, schema: _Schema, keyword: str, path: str, unit: str) -> None:
    if not schema.get("min" + keyword, 0) <= length <= schema.get("max" + keyword, length):
        raise ValueError(f"{path} has {length} {unit}")


def _check_pattern(value: str, pattern: str, path: str) -> None:
    try:
        found = regex.search(pattern, value, timeout=_PATTERN_SECONDS)
    except TimeoutError:
        raise ValueError(f"{path}: matching {pattern} takes too long") from None
    if not found:
        raise ValueError(f"{path} must match {pattern}")


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def _same(a: object, b: object) -> bool:
    """Equal as JSON: true is not 1, at any depth."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
