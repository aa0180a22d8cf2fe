"""A signature becomes a schema; what a function gives back is what the model sees."""

import asyncio
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel

from baltoro.agent.tool import CallContext, ToolResult
from baltoro.chat.declare import declare_tools
from baltoro.chat.messages import Image
from baltoro.chat.schema import check_schema
from baltoro.rollout.toolset import toolset

CONTEXT = CallContext(None, 7, 0.0)


async def book(
    title: str, seats: int, context: CallContext, kind: Literal["stalls", "box"] = "box", notes: list[str] | None = None
) -> str:
    """Book seats
    for a play.

    title: of the play
    notes: for the usher
    """
    assert kind in ("stalls", "box")
    return f"{title} {seats + context.seed} {kind} {notes}"


def run(function: object, **arguments: object) -> ToolResult:
    (tool,) = toolset(function, seconds=0.05)  # pyright: ignore[reportArgumentType]
    return asyncio.run(tool.call(arguments, CONTEXT))


def test_a_schema_worked_by_hand() -> None:
    (tool,) = toolset(book)
    assert (tool.spec.name, tool.spec.description) == ("book", "Book seats for a play.")
    assert tool.spec.parameters == {
        "type": "object",
        "properties": {
            "title": {"type": "string", "description": "of the play"},
            "seats": {"type": "integer"},
            "kind": {"type": "string", "enum": ["stalls", "box"], "default": "box"},
            "notes": {
                "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                "description": "for the usher",
            },
        },
        "required": ["title", "seats"],
    }
    check_schema(tool.spec.parameters)
    assert 'kind?: "stalls" | "box"' in declare_tools([tool.spec])


def test_arguments_arrive_and_faults_are_told() -> None:
    assert run(book, title="Hamlet", seats=2, notes=["front"]).content == ("Hamlet 9 box ['front']",)
    assert run(book, title="Hamlet", seats="two").error.startswith("seats: Input should be a valid integer")
    assert run(book, title="Hamlet", seats=2, kid="box").error == "book has no parameter kid"

    async def refuse() -> str:
        raise ValueError("the play is sold out")

    async def hang() -> str:
        await asyncio.sleep(1e9)
        return ""

    assert run(refuse).error == "the play is sold out"
    assert run(hang).error == "hang took longer than 0.05 s and was stopped"


def test_what_comes_back() -> None:
    picture = Image(np.zeros((2, 2, 3), np.uint8))
    for value, content in (
        ("text", ("text",)),
        ("", ()),
        (None, ()),
        (picture, (picture,)),
        (("see", picture), ("see", picture)),
        ({"a": [1, 2]}, ('{"a": [1, 2]}',)),
        (ToolResult(error="no"), ()),
    ):
        assert asyncio.run(returning(value)).content == content


async def returning(value: object) -> ToolResult:
    async def give() -> object:
        return value

    (tool,) = toolset(give)
    return await tool.call({}, CONTEXT)


def test_a_function_that_cannot_be_declared() -> None:
    async def bare(x) -> None: ...  # pyright: ignore[reportMissingParameterType]

    async def many(*x: int) -> None: ...

    for function in (bare, many):
        with pytest.raises(ValueError, match=f"tool {function.__name__}: annotate the parameter x"):
            toolset(function)


class Book(BaseModel):
    title: int


def test_a_parameter_may_be_called_title_at_any_depth() -> None:
    async def order(title: str, book: Book) -> None: ...

    (tool,) = toolset(order)
    assert tool.spec.parameters == {
        "type": "object",
        "properties": {"title": {"type": "string"}, "book": {"$ref": "#/$defs/Book"}},
        "required": ["title", "book"],
        "$defs": {
            "Book": {"type": "object", "properties": {"title": {"type": "integer"}}, "required": ["title"]},
        },
    }
