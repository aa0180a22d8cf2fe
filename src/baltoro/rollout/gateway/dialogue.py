"""A request's messages and tools in our words. Everything in them comes from strangers."""

import base64
import binascii
import hashlib
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

from baltoro.chat.messages import ToolCall, ToolSpec
from baltoro.chat.schema import check_schema
from baltoro.rollout.gateway.chat_request import (
    AnyPart,
    AnyTurn,
    AssistantTurn,
    FunctionTool,
    SystemTurn,
    TextPart,
    ToolTurn,
)
from baltoro.rollout.gateway.errors import ApiError
from baltoro.rollout.gateway.said import Media, Said

_OUR_ID = re.compile(r"functions\.[^<]+:[0-9]+")


@dataclass(frozen=True, eq=False)
class Dialogue:
    """`files`: those of the media, by hash. `places`: where in the request each of them first stands."""

    said: list[Said]
    files: dict[str, bytes]
    places: dict[str, str]


NOTHING = Dialogue([], {}, {})


def read_tools(tools: Sequence[FunctionTool]) -> list[ToolSpec]:
    """Raises ApiError 400 for a name that comes twice and a schema that is none."""
    specs: list[ToolSpec] = []
    for i, tool in enumerate(tools):
        function = tool.function
        parameters: dict[str, object] = {"type": "object", **(function.parameters or {})}
        if any(spec.name == function.name for spec in specs):
            raise ApiError(400, f"two tools have the name {function.name}", param=f"tools.{i}.function.name")
        try:
            check_schema(parameters)
            if parameters["type"] != "object":
                raise ValueError("parameters.type must be object")
        except (ValueError, RecursionError) as error:
            fault = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ApiError(400, f"tool {function.name}: {fault}", param=f"tools.{i}.function.parameters") from None
        specs.append(ToolSpec(function.name, function.description or "", parameters))
    return specs


def read_dialogue(
    turns: Sequence[AnyTurn], written: Container[str] = (), known: Dialogue = NOTHING, same: int = 0
) -> Dialogue:
    """Raises ApiError 400, naming the message and its fault.

    K2.5 knows tool calls as functions.name:index. Ids that another server made are replaced by the like, counted
    through the dialogue; those of this form, and those that the model is known to have `written`, stay as they are
    (model.md section 3.11). The first turns, so many as are the `same`, were read before into `known`.
    """
    reader = _Reader(written, known)
    for turn, said in zip(turns[:same], known.said, strict=False):
        reader.again(turn, said)
    new = [reader.read(turn, f"messages.{i}") for i, turn in enumerate(turns[same:], start=same)]
    return Dialogue(known.said[:same] + new, reader.files, reader.places)


class _Reader:
    def __init__(self, written: Container[str], known: Dialogue) -> None:
        self._written = written
        self._calls = 0
        self._ids: dict[str, str] = {}
        self.files = dict(known.files)
        self.places = dict(known.places)

    def again(self, turn: AnyTurn, said: Said) -> None:
        if isinstance(turn, AssistantTurn):
            for call, known in zip(turn.tool_calls or (), said.calls, strict=True):
                self._ids[call.id] = known.id
                self._calls += 1

    def read(self, turn: AnyTurn, place: str) -> Said:
        name = turn.name or ""
        if isinstance(turn, AssistantTurn):
            calls = tuple(self._call(c.id, c.function.name, c.function.arguments) for c in turn.tool_calls or ())
            content = self._parts(turn.content or (), place)
            return Said("assistant", content, turn.reasoning_content or "", calls, name=name)
        content = self._parts(turn.content, place)
        if isinstance(turn, SystemTurn):
            return Said("system", content, name=name)
        if isinstance(turn, ToolTurn):
            if turn.tool_call_id not in self._ids:
                fault = f"no assistant message before has a tool call with the id {turn.tool_call_id}"
                raise ApiError(400, f"{place}.tool_call_id: {fault}", param=f"{place}.tool_call_id")
            return Said("tool", content, answers=self._ids[turn.tool_call_id], name=name)
        return Said("user", content, name=name)

    def _call(self, call_id: str, name: str, arguments: str) -> ToolCall:
        ours = call_id in self._written or _OUR_ID.fullmatch(call_id)
        self._ids[call_id] = call_id if ours else f"functions.{name}:{self._calls}"
        self._calls += 1
        return ToolCall(self._ids[call_id], name, arguments)

    def _parts(self, content: str | Sequence[AnyPart], place: str) -> tuple[str | Media, ...]:
        if isinstance(content, str):
            return (content,) if content else ()
        return tuple(self._part(part, f"{place}.content.{i}") for i, part in enumerate(content))

    def _part(self, part: AnyPart, place: str) -> str | Media:
        if isinstance(part, TextPart):
            return part.text
        kind = "image" if part.type == "image_url" else "video"
        url = part.image_url.url if part.type == "image_url" else part.video_url.url
        try:
            data = _data(url, kind)
        except ValueError as error:
            raise media_fault(f"{place}.{part.type}.url", kind, error) from None
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.files[name] = data
        self.places.setdefault(name, f"{place}.{part.type}.url")
        return Media(kind, name)


def media_fault(place: str, kind: str, error: ValueError) -> ApiError:
    return ApiError(400, f"{place}: {error}", code=f"invalid_{kind}", param=place)


def _data(url: str, kind: str) -> bytes:
    """The bytes of `data:image/png;base64,...`. Nothing is ever fetched, so no request can reach an inner network."""
    head, comma, text = url.partition(",")
    scheme = url[:64].partition(":")[0].lower()
    if scheme != "data":
        raise ValueError(f"only data: URLs are accepted; send the {kind} as data:{kind}/...;base64,...")
    if not comma or not head[5:].lower().startswith(f"{kind}/") or not head.lower().endswith(";base64"):
        raise ValueError(f"a data: URL must read data:{kind}/...;base64,...")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the data: URL is not valid base64") from None
