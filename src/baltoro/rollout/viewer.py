"""Recorded episodes as one HTML file that works offline: groups side by side, every agent token by token.

What a model or a page wrote is untrusted. It reaches the file as JSON in which no `<` stands, and the screen as text
nodes only; the content security policy is a second wall.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from baltoro.agent.trace import Trace, Turn
from baltoro.chat.media import pixels_of
from baltoro.chat.messages import Clip, Image, MediaItem, Message, Part
from baltoro.rollout.pictures import data_uri
from baltoro.rollout.record import Json, Record, Recording, replacing
from baltoro.rollout.verify import verify


def write_view(recording: Recording, target: Path, title: str) -> None:
    """Whole or not at all. OSError where the disk does not take it."""
    with replacing(target) as scratch:
        scratch.write_text(_page(recording, title), encoding="utf-8")


def _page(recording: Recording, title: str) -> str:
    script, style = _asset("viewer.js"), _asset("viewer.css")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'"
    )
    data = json.dumps({"title": title, **_View(recording).data()}, separators=(",", ":"))
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": data.replace("<", "\\u003c")}
    pieces = re.split(r"\{\{(\w+)\}\}", _asset("viewer.html"))
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return files("baltoro.rollout").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class _View:
    """The data of the page. Token texts and pictures stand once, however often they are used."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._used: set[int] = set()
        self._pictures: dict[str, str] = {}

    def data(self) -> Json:
        groups: dict[str, Json] = {}
        for record in self._recording.records:
            if record.group not in groups:
                env = f"{record.env} {record.version}"
                groups[record.group] = {"name": record.group, "env": env, "task": record.task, "episodes": []}
            groups[record.group]["episodes"].append(self._episode(record))
        tokenizer = self._recording.tokenizer
        return {
            "groups": list(groups.values()),
            "findings": [str(finding) for finding in verify(self._recording)],
            "pieces": {token: tokenizer.decode([token]) for token in sorted(self._used)},
            "base": tokenizer.base_size,
            "pad": tokenizer.media_pad,
            "pictures": self._pictures,
        }

    def _episode(self, record: Record) -> Json:
        policy = iter(record.policy_logprobs)
        return {
            "seed": str(record.seed),  # more digits than a number of JavaScript has
            "reward": _finite(record.reward),
            "advantage": _finite(record.advantage),
            "weights": record.weights,
            "agent": self._agent(record.trace, policy),
        }

    def _agent(self, trace: Trace, policy: Iterable[tuple[float, ...]]) -> Json:
        self._used.update(trace.tokens)
        own = next(iter(policy), ())
        return {
            "role": trace.role,
            "status": trace.status,
            "error": trace.error,
            "broke": trace.broke,
            "trainable": trace.trainable,
            "signals": {name: _finite(value) for name, value in trace.signals.items()},
            "reasons": trace.reasons,
            "answer": trace.final_text,
            "tokens": trace.tokens,
            "mask": trace.loss_mask,
            "logprobs": [_finite(value) for value in trace.logprobs],
            "policy": [_finite(value) for value in own],
            "media": [self._item(item) for item in trace.media],
            # Where ids were not recorded, what was said is all there is to show.
            "messages": [] if trace.tokens else [self._message(message) for message in trace.messages],
            "turns": [self._turn(turn, policy) for turn in trace.turns],
        }

    def _turn(self, turn: Turn, policy: Iterable[tuple[float, ...]]) -> Json:
        return {
            "begin": turn.prompt_len,
            "length": len(turn.ids),
            "version": turn.weight_version,
            "times": [turn.started, turn.generated, turn.ended],
            "children": [self._agent(child, policy) for child in turn.children],
        }

    def _message(self, message: Message) -> Json:
        calls = [f"{call.id} {call.arguments}" for call in message.tool_calls]
        parts = [message.reasoning, *(self._part(part) for part in message.content), *calls]
        return {"role": message.role, "parts": [part for part in parts if part]}

    def _part(self, part: Part) -> str | list[str]:
        match part:
            case str():
                return part
            case Image():
                return [self._picture(part.pixels)]
            case Clip():
                return [self._picture(frame) for frame in part.frames]
            case _:
                return "[a video file]"

    def _item(self, item: MediaItem) -> list[str]:
        return [self._picture(frame) for frame in pixels_of(item, self._recording.media_spec)]

    def _picture(self, pixels: Any) -> str:
        name = hashlib.blake2b(pixels.tobytes() + repr(pixels.shape).encode(), digest_size=8).hexdigest()
        if name not in self._pictures:
            self._pictures[name] = data_uri(pixels)
        return name


def _finite(value: float | None) -> float | None:
    """JSON has no NaN; five digits are enough for the eye."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
