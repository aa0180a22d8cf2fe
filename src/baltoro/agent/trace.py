"""The record of one agent's run, with the runs of the agents it started: exact tokens for training, text for people."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from baltoro.chat.messages import Clip, Image, MediaItem, Message, Part, ToolCall, Video

T = TypeVar("T")

# completed: the agent answered of its own accord. limit: it was made to answer, or cut. overflow: the context was
# full (a failure, appendix E.6). failed: the engine failed.
Status = Literal["completed", "limit", "overflow", "failed"]


@dataclass(frozen=True, eq=False, slots=True)
class Turn:
    """One model call and the tool calls it led to.

    prompt_len: tokens the model read. ids, logprobs: what it wrote, exactly as sampled (engine_logprobs).
    message: the same, parsed. results: one tool message per executed call. children: agents that the calls ran,
    in the order of the calls. started, generated, ended: seconds since the start of the episode; the model wrote
    from started to generated, the tools worked from generated to ended.
    """

    prompt_len: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: int
    message: Message
    results: tuple[Message, ...]
    children: tuple["Trace", ...]
    started: float
    generated: float
    ended: float

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return self.message.tool_calls


def spread(turns: Sequence[Turn], length: int, values: Callable[[Turn], Sequence[T]], elsewhere: T) -> tuple[T, ...]:
    """Along the `length` tokens of an agent, the values of those that it sampled."""
    out = [elsewhere] * length
    for turn in turns:
        out[turn.prompt_len : turn.prompt_len + len(turn.ids)] = values(turn)
    return tuple(out)


@dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """One agent's run. `tokens`, `loss_mask` (1 on sampled tokens) and `logprobs` (0 elsewhere) are aligned;
    `media` stand in the order of their placeholders. `error` says why a run failed. `trainable`: whether the
    trainer may learn from these tokens (false for frozen subagents, section 3). `signals`: raw judgements by name;
    `reasons`: why a signal has its value, or why it is missing. `broke`: why this trace does not extend the one before
    it; empty for the first of an agent."""

    role: str
    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    loss_mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    media: tuple[MediaItem, ...]
    turns: tuple[Turn, ...]
    status: Status
    final_text: str
    trainable: bool
    error: str = ""
    signals: dict[str, float] = field(default_factory=dict[str, float])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    broke: str = ""

    @property
    def stages(self) -> tuple[tuple["Trace", ...], ...]:
        """Per turn, the agents it started."""
        return tuple(turn.children for turn in self.turns)

    @property
    def children(self) -> tuple["Trace", ...]:
        return tuple(child for turn in self.turns for child in turn.children)

    def with_signals(self, **signals: float) -> "Trace":
        return replace(self, signals={**self.signals, **signals})

    def to_json(self) -> dict[str, object]:
        """What a person wants to read. Media appear by hash; `media_by_hash` has their pixels."""
        opening = self.messages[: next((i for i, m in enumerate(self.messages) if m.role == "assistant"), None)]
        return {
            "role": self.role,
            "status": self.status,
            "error": self.error,
            "trainable": self.trainable,
            "signals": self.signals,
            "tokens": len(self.tokens),
            "prompt": [_message_json(message) for message in opening],
            "turns": [_turn_json(turn) for turn in self.turns],
            "final_text": self.final_text,
        }


def _turn_json(turn: Turn) -> dict[str, object]:
    return {
        "prompt_len": turn.prompt_len,
        "sampled": len(turn.ids),
        "weight_version": turn.weight_version,
        "started": turn.started,
        "generated": turn.generated,
        "ended": turn.ended,
        "reasoning": turn.message.reasoning,
        "text": turn.message.text,
        "calls": [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in turn.calls],
        "results": [_message_json(message) for message in turn.results],
        "children": [child.to_json() for child in turn.children],
    }


def _message_json(message: Message) -> dict[str, object]:
    return {
        "role": message.role,
        "tool_call_id": message.tool_call_id,
        "content": [_part_json(part) for part in message.content],
    }


def _part_json(part: Part) -> dict[str, object]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image):
        return {"type": "image", "hash": media_hash(part), "shape": list(part.pixels.shape)}
    if isinstance(part, Video):
        return {"type": "video"}
    return {"type": "clip", "hash": media_hash(part), "shape": list(part.frames.shape), "fps": part.fps}


def media_hash(part: Image | Clip) -> str:
    """Names a picture or clip by shape, frame rate and pixels."""
    array, head = (part.pixels, "image") if isinstance(part, Image) else (part.frames, f"clip {part.fps}")
    digest = hashlib.blake2b(f"{head} {array.shape}".encode(), digest_size=16)
    digest.update(array.tobytes())
    return digest.hexdigest()


def media_by_hash(trace: Trace) -> dict[str, Image | Clip]:
    """Every picture and clip that the agent or its children saw; video files stay where they are."""
    found = {
        media_hash(part): part
        for message in trace.messages
        for part in message.content
        if isinstance(part, Image | Clip)
    }
    for child in trace.children:
        found.update(media_by_hash(child))
    return found
