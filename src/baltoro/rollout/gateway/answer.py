"""Tokens from the engine become events, and events the model's answer, whatever dialect then tells it.

The streamed and the whole form are made of the same events, so they never differ.
"""

from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Literal

from baltoro.agent.engine import Sampling, StreamingEngine
from baltoro.chat.messages import Message, TokenSequence, ToolSpec
from baltoro.chat.parse import (
    CallBegun,
    CallEnded,
    CompletionParser,
    ContentDelta,
    Event,
    Malformed,
    Parsed,
    fold,
)
from baltoro.chat.schema import parse_arguments
from baltoro.chat.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, eq=False)
class Job:
    """What a request asks for. `read`: the ids of the prompt; a relay learns them with the answer. `prompt`: what is
    to be read, where it is known before. `samplings`: one for each choice. `calls`: how many tool calls it admits."""

    model: str
    prompt: TokenSequence
    read: "array[int]"
    samplings: Sequence[Sampling]
    tools: Sequence[ToolSpec]
    thinking: bool
    stops: Sequence[str]
    calls: Literal["none", "one", "any"]


@dataclass(frozen=True)
class Step:
    """Some tokens, drawn by the weights `version`, and what they added. The last step has a finish reason and no token;
    `stop` is the string that ended the answer, where one did."""

    events: tuple[Event, ...]
    ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    version: int = 0
    finish: FinishReason | None = None
    stop: str = ""


@dataclass(frozen=True, eq=False)
class Drawn:
    """The tokens of an answer, the stop token included: log-probability and version of the weights of each."""

    ids: "array[int]" = field(default_factory=lambda: array("i"))
    logprobs: "array[float]" = field(default_factory=lambda: array("d"))
    versions: "array[int]" = field(default_factory=lambda: array("i"))

    def add(self, step: Step) -> None:
        self.ids.extend(step.ids)
        self.logprobs.extend(step.logprobs)
        self.versions.extend(repeat(step.version, len(step.ids)))


async def speak(engine: StreamingEngine, job: Job, tokenizer: Tokenizer, index: int) -> AsyncGenerator[Step]:
    """The steps of choice `index`. Ends the engine's work where a stop string, or a call too many, ends the answer."""
    parser = CompletionParser(tokenizer, job.thinking)
    stop = _StopStrings(job.stops)
    finish: FinishReason = "length"
    called = False
    async with aclosing(engine.stream(job.prompt, job.samplings[index], job.model)) as tokens:
        async for sampled in tokens:
            events: list[Event] = []
            cut = False
            for event in parser.feed(sampled.token):
                if isinstance(event, CallBegun) and job.calls == "none":
                    events.append(Malformed(f"a call of {event.name}, where tool_choice is none"))
                    cut = True
                    break
                events += stop.feed(event)
                called |= isinstance(event, CallEnded)
                cut = bool(stop.found) or (called and job.calls == "one")
                if cut:
                    break
            yield Step(tuple(events), (sampled.token,), (sampled.logprob,), sampled.weight_version)
            if cut or sampled.token == tokenizer.im_end:
                finish = "tool_calls" if called else "stop"
                break
    events = [] if stop.found else stop.rest()
    if finish == "length":
        # That the turn was cut off is what this reason says.
        events += [event for event in parser.finish()[:-1] for event in stop.feed(event)]
        events += stop.rest()
    yield Step(tuple(events), finish=finish, stop=stop.found)


class _StopStrings:
    """Ends the content before the first stop string; what may be the beginning of one is held back. Reasoning and
    arguments are not searched: cut there, they would be of no use."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = ""

    def feed(self, event: Event) -> list[Event]:
        if not isinstance(event, ContentDelta):
            return [*self.rest(), event]
        text = self._held + event.text
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        first, self.found = min(places, default=(0, ""))
        cut = first if places else len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[cut:]
        return [ContentDelta(text[:cut])] if cut else []

    def rest(self) -> list[Event]:
        text, self._held = self._held, ""
        return [ContentDelta(text)] if text else []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Choice:
    """One answer as far as it was drawn."""

    job: Job
    index: int
    drawn: Drawn = field(default_factory=Drawn)
    events: list[Event] = field(default_factory=list[Event])
    finish: FinishReason | None = None
    stop: str = ""

    def add(self, step: Step) -> None:
        self.drawn.add(step)
        self.events += step.events
        self.finish = step.finish
        self.stop = step.stop

    @property
    def message(self) -> Message:
        return self._parsed.message

    @cached_property
    def _parsed(self) -> Parsed:
        """To be asked when the answer has ended."""
        assert self.finish is not None
        return fold(self.events)

    def errors(self) -> list[str]:
        """What the model got wrong: calls that could not be read, and arguments that do not fit the schema."""
        parsed = self._parsed
        errors = list(parsed.errors)
        schemas = {tool.name: tool.parameters for tool in self.job.tools}
        for call in parsed.message.tool_calls if schemas else ():
            try:
                if call.name not in schemas:
                    raise ValueError(f'there is no tool "{call.name}"')
                parse_arguments(call.arguments, schemas[call.name])
            except ValueError as error:
                errors.append(f"{call.id}: {error}")
        return errors
