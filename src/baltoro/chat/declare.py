"""Tools as the TypeScript declarations that K2.5 reads in its `tool_declare` turn (model.md section 12)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from baltoro.chat.messages import ToolSpec

_Schema = Mapping[str, Any]
_INDENT = "  "
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION_MEMBERS = {"integer": "number", "object": "{}", "array": "Array<any>"}


@dataclass
class _Scope:
    """What the references of one function may name, and whether one of them names the whole schema."""

    definitions: dict[str, _Schema | bool] = field(default_factory=dict[str, _Schema | bool])
    names_root: bool = False


def declare_tools(tools: Sequence[ToolSpec]) -> str:
    """Raises ValueError, naming the tool, for a schema that has no TypeScript form; the release would fall back to
    JSON without a word, which the model was not trained on."""
    functions = "".join(_function(tool) + "\n" for tool in tools)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{functions}}}\n"


def _function(tool: ToolSpec) -> str:
    scope = _Scope()
    schema = _sorted(tool.parameters)
    try:
        argument = _object(schema, scope, "")
        lines: list[str] = []
        if scope.names_root:
            # Unlike an inline object, this one does not put the required fields first.
            fields = [_field(schema, name, scope, _INDENT) for name in schema.get("properties", ())]
            lines.append(f"interface parameters {_braces(fields, '')}")
            argument = "parameters"
        for name, definition in list(scope.definitions.items()):
            description = "" if isinstance(definition, bool) else definition.get("description", "")
            description = _comment({"description": description}, "")
            lines.append(f"{description}interface {name} {_type(definition, scope, '')}")
    except ValueError as error:
        raise ValueError(f"tool {tool.name}: {error}") from None
    description = _comment({"description": tool.description}, "")
    return "\n".join([*lines, f"{description}type {tool.name} = (_: {argument}) => any;"])


def _type(schema: _Schema | bool, scope: _Scope, indent: str) -> str:
    if schema is True or schema == {}:
        return "any"
    if schema is False:
        return "null"
    if "$ref" in schema:
        return _reference(schema["$ref"], scope)
    if "anyOf" in schema:
        return " | ".join(_type(option, scope, indent) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])
    match schema.get("type"):
        case list():
            members: list[str] = schema["type"]
            return " | ".join(_UNION_MEMBERS.get(member, member) for member in members)
        case "object":
            return _object(schema, scope, indent)
        case "array":
            return _array(schema.get("items") or {}, scope, indent)
        case "integer":
            return "number"
        case str(name):
            return name
        case _:
            raise ValueError(f"this JSON schema has no TypeScript form: {json.dumps(schema)}")


def _object(schema: _Schema, scope: _Scope, indent: str) -> str:
    scope.definitions.update(schema.get("$defs", {}))
    required = schema.get("required", ())
    names = sorted(schema.get("properties", ()), key=lambda name: (name not in required, name))
    inner = indent + _INDENT
    fields = [_field(schema, name, scope, inner) for name in names]
    match schema.get("additionalProperties"):
        case None:
            pass
        case False:
            fields.append(f"{inner}[k: string]: never")
        case others:
            fields.append(f"{inner}[k: string]: {_type(others, scope, inner)}")
    return _braces(fields, indent)


def _braces(fields: list[str], indent: str) -> str:
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}" if fields else "{}"


def _field(schema: _Schema, name: str, scope: _Scope, indent: str) -> str:
    value: _Schema | bool = schema["properties"][name]
    mark = "" if name in schema.get("required", ()) else "?"
    comment = "" if isinstance(value, bool) else _comment(value, indent)
    if not isinstance(value, bool) and (default := value.get("default")) is not None:
        # Python's spelling of booleans, as the release writes them.
        text = repr(default) if isinstance(default, int | float) else json.dumps(default, ensure_ascii=False)
        comment += f"{indent}// Default: {text}\n"
    return f"{comment}{indent}{name}{mark}: {_type(value, scope, indent)}"


def _array(items: _Schema | bool, scope: _Scope, indent: str) -> str:
    inner = indent + _INDENT
    comment = "" if isinstance(items, bool) else _comment(items, inner)
    if not comment:
        return f"Array<{_type(items, scope, indent)}>"
    return f"Array<\n{comment}{inner}{_type(items, scope, inner)}\n{indent}>"


def _reference(target: str, scope: _Scope) -> str:
    if target == "#":
        scope.names_root = True
        return "parameters"
    name = target.removeprefix("#/$defs/")
    if name not in scope.definitions:
        raise ValueError(f"the reference {target} leads nowhere; only # and #/$defs/name are known")
    return name


def _comment(schema: _Schema, indent: str) -> str:
    """Description lines and constraints above a type, each ending in a newline."""
    text = ""
    if description := schema.get("description"):
        text = "".join(f"{indent}// {line}\n" if line else "\n" for line in description.split("\n"))
    kind = schema.get("type")
    if isinstance(kind, str) and not schema.keys() & {"$ref", "anyOf", "enum"}:
        constraints = [f"{key}: {schema[key]}" for key in _CONSTRAINTS.get(kind, ()) if key in schema]
        if constraints:
            text += f"{indent}// {', '.join(constraints)}\n"
    return text


def _sorted(value: Any) -> Any:
    """Dictionaries by key at every depth: the release sorts before it declares."""
    if isinstance(value, dict):
        items = cast(dict[str, Any], value)
        return {key: _sorted(items[key]) for key in sorted(items)}
    if isinstance(value, list):
        return [_sorted(member) for member in cast(list[Any], value)]
    return value
