import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.chat.declare import declare_tools
from baltoro.chat.messages import ToolSpec
from baltoro.chat.schema import check_schema, parse_arguments

TREE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 3, "pattern": "^[a-z]"},
        "size": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        "mode": {"enum": ["on", 1, None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 2},
        "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "number"}}]},
        "child": {"$ref": "#"},
        "free": {"type": "object", "properties": {"a": True, "b": False}, "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "enum": ["x", "y"]}},
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "abc"},
        {"name": "a", "size": 0, "mode": "on", "tags": ["x", "y"], "either": True},
        {"name": "a", "size": None, "mode": None, "either": [1, 2.5]},
        {"name": "日", "child": {"name": "b", "child": {"name": "c"}}} | {"name": "a"},
        {"name": "a", "free": {"a": [{}], "other": "text"}},
    ],
)
def test_accepts(arguments: dict[str, object]) -> None:
    check_schema(TREE)
    assert parse_arguments(json.dumps(arguments), TREE) == arguments


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"name": ""}, "name has 0 characters"),
        ({"name": "abcd"}, "name has 4 characters"),
        ({"name": "A"}, r"name must match \^\[a-z\]"),
        ({"name": None}, "name must be of type string"),
        ({"size": 10}, "size must be at most 9"),
        ({"size": -1}, "size must be at least 0"),
        ({"size": 1.0}, "size must be of type integer or null"),
        ({"size": True}, "size must be of type integer or null"),
        ({"mode": True}, r'mode must be one of \["on", 1, null\]'),
        ({"tags": []}, "tags has 0 items"),
        ({"tags": ["x", "z"]}, r"tags\[1\] must be one of"),
        ({"either": "no"}, "either must be of type boolean; or either must be of type array"),
        ({"child": {"name": "b", "child": {}}}, 'child.child lacks "name"'),
        ({"free": {"b": 1}}, "free.b is not allowed"),
        ({"free": {"c": 1}}, "free.c must be of type string"),
        ({"unknown": 1}, "unknown is not allowed"),
    ],
)
def test_names_the_place_and_the_fault(change: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=f"^{fault}"):
        parse_arguments(json.dumps({"name": "a"} | change), TREE)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "[" * 100_000, "{} {}"])
def test_arguments_that_are_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_arguments(text, {})


def test_an_endless_reference_and_an_exponential_pattern_end() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_arguments("{}", {"$ref": "#"})
    slow = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a|aa|a?)+$"}}}
    with pytest.raises(ValueError, match="takes too long"):
        parse_arguments(json.dumps({"x": "a" * 40 + "!"}), slow)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (5, "parameters must be a JSON schema"),
        ({"type": "text"}, "parameters.type must be one or several of string"),
        ({"type": []}, "parameters.type"),
        ({"properties": {"x": {"type": "array", "items": 3}}}, "parameters.properties.x.items must be a JSON schema"),
        ({"required": "x"}, "parameters.required must be an array of strings"),
        ({"enum": []}, "parameters.enum"),
        ({"anyOf": {}}, "parameters.anyOf"),
        ({"$ref": "#/$defs/x"}, "parameters.$ref"),
        ({"$defs": {"x": 1}}, "parameters.$defs.x must be a JSON schema"),
        ({"description": 1}, "parameters.description must be a string"),
        ({"pattern": "("}, "parameters.pattern must be a regular expression"),
        ({"minLength": -1}, "parameters.minLength"),
        ({"maximum": "9"}, "parameters.maximum must be a number"),
    ],
)
def test_a_broken_schema_is_named(schema: object, fault: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_schema(schema)
    assert str(error.value).startswith(fault)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.text(max_size=3), st.sampled_from(["object", "#"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*TREE, "x"]), inner)),
    max_leaves=8,
)
keywords = [*TREE, "$ref", "anyOf", "enum", "items", "description", "default", "pattern", "minLength", "maximum"]
schemas = st.recursive(
    st.one_of(st.booleans(), st.just({"type": "string"})),
    lambda inner: st.dictionaries(
        st.sampled_from(keywords), st.one_of(values, inner, st.dictionaries(st.sampled_from("xy"), inner)), max_size=4
    ),
    max_leaves=6,
)


@given(schema=schemas, value=values)
def test_a_checked_schema_never_breaks_what_reads_it(schema: Any, value: object) -> None:
    """Declaring and checking raise nothing but ValueError once `check_schema` let the schema pass."""
    try:
        check_schema(schema)
        declare_tools([ToolSpec("f", "", schema)] if isinstance(schema, dict) else [])
        parse_arguments(json.dumps(value), schema)
    except ValueError:
        pass
