"""Tools from plain coroutine functions: the signature and the docstring are the specification."""

import asyncio
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast, get_type_hints

from pydantic import Field, ValidationError, create_model

from baltoro.agent.tool import CallContext, Tool, ToolResult
from baltoro.chat.messages import Clip, Image, Part, ToolSpec, Video

Function = Callable[..., Awaitable[object]]


def toolset(*functions: Function, sequential: bool = False, seconds: float = 60.0) -> list[Tool]:
    """One tool per function, under its name.

    The docstring up to its first empty line describes the tool; a line `name: text` after it describes a parameter.
    Every parameter is annotated; one annotated CallContext is filled in and not shown to the model. What is returned is
    shown: text, a picture, a sequence of both, a ToolResult, or else JSON. ValueError is the way to tell the model what
    it did wrong. A call that takes longer than `seconds` is cancelled, and the model is told.
    """
    return [FunctionTool(function, sequential, seconds) for function in functions]


class FunctionTool:
    def __init__(self, function: Function, sequential: bool, seconds: float) -> None:
        """Raises ValueError, naming function and parameter, for what cannot be declared."""
        self._function = function
        self._seconds = seconds
        self.sequential = sequential
        name = function.__name__
        summary, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
        about = dict(re.findall(r"^(\w+): (.+)$", rest, re.MULTILINE))
        hints = get_type_hints(function)
        fields: dict[str, Any] = {}
        self._context = ""
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise ValueError(f"tool {name}: annotate the parameter {parameter.name}, so that it can be declared")
            if hints[parameter.name] is CallContext:
                self._context = parameter.name
                continue
            default = ... if parameter.default is parameter.empty else parameter.default
            described = Field(default, description=about.get(parameter.name))
            fields[parameter.name] = (hints[parameter.name], described)
        self._model = create_model(name, **fields)
        schema: dict[str, object] = {"type": "object", "properties": {}}
        schema |= untitled(self._model.model_json_schema())
        self.spec = ToolSpec(name, " ".join(summary.split()), schema)

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        unknown = sorted(arguments.keys() - self._model.model_fields.keys())
        if unknown:
            return ToolResult(error=f"{self.spec.name} has no parameter {', '.join(unknown)}")
        try:
            given = self._model.model_validate(arguments)
            values = {key: getattr(given, key) for key in self._model.model_fields}
            if self._context:
                values[self._context] = context
            async with asyncio.timeout(self._seconds):
                return shown(await self._function(**values))
        except ValidationError as error:
            first = error.errors()[0]
            return ToolResult(error=f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except ValueError as error:
            return ToolResult(error=str(error))
        except TimeoutError:
            return ToolResult(error=f"{self.spec.name} took longer than {self._seconds:g} s and was stopped")


def shown(value: object) -> ToolResult:
    """What a function returned, as the model sees it."""
    if isinstance(value, ToolResult):
        return value
    if value is None:
        return ToolResult()
    if _is_part(value):
        return ToolResult((cast(Part, value),) if value else ())
    if isinstance(value, list | tuple) and all(_is_part(part) for part in cast(Sequence[object], value)):
        return ToolResult(tuple(cast(Sequence[Part], value)))
    return ToolResult((json.dumps(value, ensure_ascii=False, default=str),))


def _is_part(value: object) -> bool:
    return isinstance(value, str | Image | Clip | Video)


def untitled(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the titles that pydantic invents; a parameter may be called title."""
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "title":
            continue
        if key in ("properties", "$defs"):
            out[key] = {name: untitled(below) for name, below in value.items()}
        elif isinstance(value, dict):
            out[key] = untitled(cast(dict[str, Any], value))
        elif isinstance(value, list):
            items = cast(list[Any], value)
            out[key] = [untitled(cast(dict[str, Any], v)) if isinstance(v, dict) else v for v in items]
        elif key == "const":
            out["enum"] = [value]
        elif not (key == "default" and value is None):
            out[key] = value
    return out
