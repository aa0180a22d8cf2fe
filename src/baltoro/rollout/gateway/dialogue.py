"""A request's messages and tools in our words. Everything in them comes from strangers."""

import base64
import binascii
import re
from collections.abc import Sequence

from baltoro.chat.decode import decode_image
from baltoro.chat.messages import Image, Message, Part, ToolCall, ToolSpec, Video
from baltoro.chat.schema import check_schema
from baltoro.rollout.gateway.protocol import (
    AnyPart,
    AnyTurn,
    ApiError,
    AssistantTurn,
    ChatRequest,
    FunctionTool,
    SystemTurn,
    TextPart,
    ToolTurn,
)

_OUR_ID = re.compile(r"functions\.[^<]+:[0-9]+")
# Pictures are decoded before they are shrunk, so this bounds the memory of one request to some 400 MB.
_PIXEL_LIMIT = 2**27


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


def read_messages(request: ChatRequest) -> list[Message]:
    """Raises ApiError 400, naming the message and its fault. Pictures are decoded here, videos when they are rendered.

    K2.5 knows tool calls as functions.name:index. Ids that another server made are replaced by the like, counted
    through the dialogue; those of this form stay as the model wrote them (model.md section 3.11).
    """
    reader = _Reader()
    return [reader.read(turn, f"messages.{i}") for i, turn in enumerate(request.messages)]


class _Reader:
    def __init__(self) -> None:
        self._calls = 0
        self._ids: dict[str, str] = {}
        self._pixels = 0

    def read(self, turn: AnyTurn, place: str) -> Message:
        name = turn.name or ""
        if isinstance(turn, AssistantTurn):
            calls = tuple(self._call(c.id, c.function.name, c.function.arguments) for c in turn.tool_calls or ())
            content = self._parts(turn.content or (), place)
            return Message("assistant", content, turn.reasoning_content or "", calls, name=name)
        content = self._parts(turn.content, place)
        if isinstance(turn, SystemTurn):
            return Message("system", content, name=name)
        if isinstance(turn, ToolTurn):
            if turn.tool_call_id not in self._ids:
                fault = f"no assistant message before has a tool call with the id {turn.tool_call_id}"
                raise ApiError(400, f"{place}.tool_call_id: {fault}", param=f"{place}.tool_call_id")
            return Message("tool", content, tool_call_id=self._ids[turn.tool_call_id], name=name)
        return Message("user", content, name=name)

    def _call(self, call_id: str, name: str, arguments: str) -> ToolCall:
        self._ids[call_id] = call_id if _OUR_ID.fullmatch(call_id) else f"functions.{name}:{self._calls}"
        self._calls += 1
        return ToolCall(self._ids[call_id], name, arguments)

    def _parts(self, content: str | Sequence[AnyPart], place: str) -> tuple[Part, ...]:
        if isinstance(content, str):
            return (content,) if content else ()
        return tuple(self._part(part, f"{place}.content.{i}") for i, part in enumerate(content))

    def _part(self, part: AnyPart, place: str) -> Part:
        if isinstance(part, TextPart):
            return part.text
        kind = "image" if part.type == "image_url" else "video"
        url = part.image_url.url if part.type == "image_url" else part.video_url.url
        try:
            data = _data(url, kind)
            return self._image(data) if kind == "image" else Video(data)
        except ValueError as error:
            param = f"{place}.{part.type}.url"
            raise ApiError(400, f"{param}: {error}", code=f"invalid_{kind}", param=param) from None

    def _image(self, data: bytes) -> Image:
        image = decode_image(data)
        self._pixels += image.pixels.shape[0] * image.pixels.shape[1]
        if self._pixels > _PIXEL_LIMIT:
            raise ValueError(f"the images of one request have more than {_PIXEL_LIMIT} pixels; scale them down")
        return image


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
