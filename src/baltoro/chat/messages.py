"""What agents, environments and trainers say to a model: messages, tool calls and media. Plain data, no tensors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, eq=False, slots=True)
class Image:
    """One picture, uint8 RGB of shape [height, width, 3]."""

    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False, slots=True)
class Clip:
    """Frames of one video, uint8 RGB of shape [frames, height, width, 3], sampled at `fps` frames per second."""

    frames: NDArray[np.uint8]
    fps: float


@dataclass(frozen=True, eq=False, slots=True)
class Video:
    """A video file. It is decoded where it is rendered, chunk by chunk: its frames may be larger than memory."""

    file: bytes | Path


Part = str | Image | Clip | Video


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`id` is `functions.{name}:{index}`; `arguments` is the JSON text exactly as written."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A callable tool as the model sees it; `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: dict[str, object]


@dataclass(frozen=True, eq=False, slots=True)
class Message:
    """One turn of the K2.5 chat format.

    `reasoning` is the text between <think> and </think> (assistant only; empty in instant mode).
    `tool_call_id` names the call that a tool message answers. `name` replaces the role word in the header.
    """

    role: Role
    content: tuple[Part, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))


def system(text: str) -> Message:
    return Message("system", (text,))


def user(*content: Part) -> Message:
    return Message("user", content)


def assistant(text: str = "", *, reasoning: str = "", tool_calls: tuple[ToolCall, ...] = ()) -> Message:
    return Message("assistant", (text,) if text else (), reasoning=reasoning, tool_calls=tool_calls)


def tool_result(call_id: str, *content: Part) -> Message:
    return Message("tool", content, tool_call_id=call_id)


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class MediaItem:
    """One preprocessed image or one chunk of at most four frames, as the vision tower takes it.

    patches: float32 [t*h*w, 3, patch, patch], raster order, frame after frame. grid_thw: (t, h, w) in patches.
    It stands in the token sequence as (h/merge)*(w/merge) consecutive <|media_pad|> tokens, whatever t is.
    """

    patches: NDArray[np.float32]
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True, eq=False, slots=True)
class TokenSequence:
    """What a model reads: ids with expanded media placeholders, the media in order of their placeholders,
    and for training a loss mask of the same length as ids (1 where the token is a target)."""

    ids: list[int] = field(default_factory=list[int])
    media: list[MediaItem] = field(default_factory=list[MediaItem])
    loss_mask: list[int] = field(default_factory=list[int])
