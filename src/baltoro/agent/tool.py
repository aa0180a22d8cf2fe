"""What an agent can call: a specification the model reads, and a coroutine that answers."""

import json
from dataclasses import dataclass
from typing import Protocol, cast

from baltoro.agent.trace import Trace
from baltoro.chat.messages import Part, ToolSpec


@dataclass(frozen=True)
class CallContext:
    """What a tool may know about the call.

    steps_left: critical steps left to the calling agent after the turn that made the call (None: unlimited).
    seed: belongs to this call alone, whatever else runs at the same time.
    origin: the episode's start on the time.monotonic clock.
    """

    steps_left: int | None
    seed: int
    origin: float


@dataclass(frozen=True)
class ToolResult:
    """What came back. The model sees `content`, or `error` where there is no content.

    children: the agents that the call ran; steps: the critical steps that it took (0 for a direct tool).
    """

    content: tuple[Part, ...] = ()
    children: tuple[Trace, ...] = ()
    error: str = ""
    steps: int = 0

    @property
    def shown(self) -> tuple[Part, ...]:
        return self.content or (f"error: {self.error}" if self.error else "(no output)",)


class Tool(Protocol):
    @property
    def spec(self) -> ToolSpec: ...

    @property
    def sequential(self) -> bool:
        """True: calls of this tool run before the others of their turn, one after another, in the order written."""
        ...

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        """`arguments` satisfy the schema. What the model did wrong is a result with `error`, not an exception."""
        ...


def parse_arguments(text: str, spec: ToolSpec) -> dict[str, object]:
    """The arguments of a call, checked against the schema. Raises ValueError with a text for the model."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("the arguments are not valid JSON") from None
    check_schema(value, spec.parameters, "arguments")
    return cast(dict[str, object], value)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def check_schema(value: object, schema: dict[str, object], path: str) -> None:
    """The part of JSON schema that tool parameters use: type, required, properties, items, minItems, maxItems, enum.

    Raises ValueError naming the place and the fault.
    """
    kind = schema.get("type")
    if isinstance(kind, str):
        fits = isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
        if not fits:
            raise ValueError(f"{path} must be of type {kind}")
    allowed = schema.get("enum")
    if isinstance(allowed, list) and value not in cast(list[object], allowed):
        raise ValueError(f"{path} must be one of {json.dumps(allowed)}")
    if isinstance(value, dict):
        fields = cast(dict[str, object], value)
        for key in cast(list[str], schema.get("required", [])):
            if key not in fields:
                raise ValueError(f'{path} lacks "{key}"')
        properties = cast(dict[str, dict[str, object]], schema.get("properties", {}))
        for key, item in fields.items():
            if key in properties:
                check_schema(item, properties[key], key)
    if isinstance(value, list):
        items = cast(list[object], value)
        if not cast(int, schema.get("minItems", 0)) <= len(items) <= cast(int, schema.get("maxItems", len(items))):
            raise ValueError(f"{path} has {len(items)} items")
        for index, item in enumerate(items):
            check_schema(item, cast(dict[str, object], schema.get("items", {})), f"{path}[{index}]")
