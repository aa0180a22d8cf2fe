"""A streamed answer as blocks of reasoning, text and calls, one after another: what Anthropic's and OpenAI's newer
dialect tell. A call is told when it is whole, so that one which turns out malformed is never announced."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from baltoro.chat.messages import ToolCall
from baltoro.chat.parse import ArgumentsDelta, CallBegun, CallEnded, ContentDelta, Event, Malformed, ReasoningDelta


@dataclass(frozen=True)
class Begun:
    index: int
    kind: Literal["reasoning", "text"]


@dataclass(frozen=True)
class Delta:
    index: int
    kind: Literal["reasoning", "text"]
    text: str


@dataclass(frozen=True)
class Ended:
    """`text`: of the whole block."""

    index: int
    kind: Literal["reasoning", "text"]
    text: str


@dataclass(frozen=True)
class Called:
    """A block of its own, whole."""

    index: int
    call: ToolCall


class Blocks:
    def __init__(self) -> None:
        self._index = -1
        self._kind: Literal["reasoning", "text"] | None = None
        self._text = ""
        self._call = CallBegun("", "")
        self._arguments = ""

    def feed(self, events: Iterable[Event]) -> list[Begun | Delta | Ended | Called]:
        told: list[Begun | Delta | Ended | Called] = []
        for event in events:
            match event:
                case ReasoningDelta(text):
                    told += self._say("reasoning", text)
                case ContentDelta(text):
                    told += self._say("text", text)
                case CallBegun():
                    self._call, self._arguments = event, ""
                case ArgumentsDelta(text):
                    self._arguments += text
                case CallEnded():
                    told += self.end()
                    self._index += 1
                    told.append(Called(self._index, ToolCall(self._call.id, self._call.name, self._arguments)))
                case Malformed():
                    pass
        return told

    def end(self) -> list[Begun | Delta | Ended | Called]:
        """Closes the block that is open."""
        if self._kind is None:
            return []
        ended = Ended(self._index, self._kind, self._text)
        self._kind, self._text = None, ""
        return [ended]

    def _say(self, kind: Literal["reasoning", "text"], text: str) -> list[Begun | Delta | Ended | Called]:
        told: list[Begun | Delta | Ended | Called] = []
        if self._kind != kind:
            told = self.end()
            self._index += 1
            self._kind = kind
            told.append(Begun(self._index, kind))
        self._text += text
        return [*told, Delta(self._index, kind, text)]
