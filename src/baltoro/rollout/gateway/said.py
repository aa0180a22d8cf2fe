"""What was said in a dialogue, in the one form in which the gateway compares, stores and renders it: media by the hash
of their files, whatever dialect they came in."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import orjson

from baltoro.chat.decode import decode_image
from baltoro.chat.messages import Image, Message, Part, Role, ToolCall, ToolSpec, Video

# Pictures are decoded before they are shrunk, so this bounds the memory of one request to some 400 MB.
_PIXEL_LIMIT = 2**27


@dataclass(frozen=True)
class Media:
    """A picture or a video by the hash of its file."""

    kind: Literal["image", "video"]
    hash: str


@dataclass(frozen=True)
class Said:
    """One turn. `answers` is the id of the call that a tool message answers."""

    role: Role
    content: tuple[str | Media, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    answers: str = ""
    name: str = ""

    @cached_property
    def digest(self) -> bytes:
        """Equal for turns that a client may take for the same: clients drop the reasoning, strip the answer and write
        arguments anew."""
        content = list(_joined(self.content))
        if self.role == "assistant":
            content = ["".join(part for part in content if isinstance(part, str)).strip()]
        calls = [(call.id, call.name, _arguments(call.arguments)) for call in self.calls]
        parts = [part if isinstance(part, str) else [part.kind, part.hash] for part in content]
        return _digest([self.role, parts, calls, self.answers, self.name])

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for part in self.content if isinstance(part, Media))

    def to_json(self) -> list[Any]:
        parts = [part if isinstance(part, str) else [part.kind, part.hash] for part in self.content]
        calls = [[call.id, call.name, call.arguments] for call in self.calls]
        return [self.role, parts, self.reasoning, calls, self.answers, self.name]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> "Said":
        role, parts, reasoning, calls, answers, name = fields
        content = tuple(part if isinstance(part, str) else Media(*part) for part in parts)
        return cls(role, content, reasoning, tuple(ToolCall(*call) for call in calls), answers, name)


@dataclass(frozen=True)
class Setting:
    """What stands before the first message and behind the last one: where it differs, no token is shared."""

    tools: tuple[ToolSpec, ...]
    thinking: bool

    @cached_property
    def digest(self) -> bytes:
        return _digest([self.thinking, self.tools_json()])

    def tools_json(self) -> list[Any]:
        return [[tool.name, tool.description, tool.parameters] for tool in self.tools]


def chained(before: bytes, said: Said) -> bytes:
    """The key of a dialogue that goes on with `said`."""
    return hashlib.blake2b(before + said.digest, digest_size=16).digest()


def to_messages(said: Sequence[Said], files: Mapping[str, bytes]) -> list[Message]:
    """Decodes pictures here, videos where they are rendered. Raises ValueError for more pixels than one request may
    have; BrokenMedia for a file that is no picture."""
    pixels = 0

    def part(piece: str | Media) -> Part:
        nonlocal pixels
        if isinstance(piece, str):
            return piece
        if piece.kind == "video":
            return Video(files[piece.hash])
        image = _decode(piece, files)
        pixels += image.pixels.shape[0] * image.pixels.shape[1]
        if pixels > _PIXEL_LIMIT:
            raise BrokenMedia(piece, f"the images of one request have more than {_PIXEL_LIMIT} pixels; scale them down")
        return image

    return [
        Message(one.role, tuple(part(p) for p in one.content), one.reasoning, one.calls, one.answers, one.name)
        for one in said
    ]


class BrokenMedia(ValueError):
    """`media` cannot be shown to the model."""

    def __init__(self, media: Media, fault: str) -> None:
        super().__init__(fault)
        self.media = media


def _decode(media: Media, files: Mapping[str, bytes]) -> Image:
    try:
        return decode_image(files[media.hash])
    except ValueError as error:
        raise BrokenMedia(media, str(error)) from None


def _joined(content: Sequence[str | Media]) -> Sequence[str | Media]:
    parts: list[str | Media] = []
    for part in content:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def _arguments(text: str) -> object:
    """Arguments that are no JSON object come back as the empty one from clients that have no other form for them."""
    try:
        arguments = orjson.loads(text)
    except ValueError:
        arguments = None
    return cast(object, arguments) if isinstance(arguments, dict) else {}


def _digest(value: object) -> bytes:
    text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(text, digest_size=16).digest()
