"""Episodes on disk: one JSON line each in `NAME.jsonl`, what is large beside it in `NAME.files/` (appendix D).

The first line names the tokenizer and the media settings, so that a file can be read, checked and shown by itself.
Every message and every sampled token of an agent is written once.
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from baltoro.agent.trace import Status, Trace, Turn
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Clip, Image, Message, Part, Role, ToolCall, Video
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.blobs import Blobs

Json = dict[str, Any]
_FORMAT = "baltoro episodes 1"


@dataclass(frozen=True, eq=False)
class Record:
    """One episode. task: the row it was made from. group: the K episodes of one task share it. weights: of the signals
    that make the reward; a weight may belong to a signal that is missing, because its judge failed. reward: None where
    one is missing. advantage: as trained on. policy_logprobs: for each agent in the order of `agents`, aligned
    with its tokens; empty where the trainer kept none."""

    env: str
    version: str
    task: Json
    group: str
    seed: int
    trace: Trace
    weights: dict[str, float] = field(default_factory=dict[str, float])
    reward: float | None = None
    advantage: float | None = None
    policy_logprobs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Recording:
    """The contents of a file of episodes."""

    tokenizer: Tokenizer
    media_spec: MediaSpec
    records: list[Record]


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Write to the yielded path; it takes the place of `path` only when all went well."""
    scratch = path.with_name(path.name + ".writing")
    yield scratch
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
    scratch.rename(path)


def agents(trace: Trace) -> Iterator[tuple[str, Trace]]:
    """The agent and all below it, each with its place: "0", "0.2" for the third child of the first, and so on."""

    def visit(trace: Trace, place: str) -> Iterator[tuple[str, Trace]]:
        yield place, trace
        for index, child in enumerate(trace.children):
            yield from visit(child, f"{place}.{index}")

    return visit(trace, "0")


def write_episodes(path: Path, records: Iterable[Record], tokenizer: Tokenizer, media_spec: MediaSpec) -> None:
    """Appends. Other processes may append at the same time; a line that a dead one left unfinished is removed.

    Raises ValueError where the file was begun with another tokenizer or other media settings, OSError."""
    blobs = _blobs(path)
    header = json.dumps(
        {
            "format": _FORMAT,
            "tokenizer": blobs.put_tokenizer(tokenizer),
            "media_spec": dataclasses.asdict(media_spec),
        }
    )
    lines = [json.dumps(_record_json(record, blobs), separators=(",", ":")) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _drop_torn_line(file):
            lines.insert(0, header)
        else:
            file.seek(0)
            if file.readline().decode().rstrip("\n") != header:
                raise ValueError(f"{path} was begun with another tokenizer or other media; write to another file")
        file.write("".join(f"{line}\n" for line in lines).encode())


def read_episodes(path: Path) -> Recording:
    """Everything that was written whole. Raises ValueError for what is no such file, OSError."""
    blobs = _blobs(path)
    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    try:
        header = cast(Json, json.loads(lines[0])) if lines else {}
        if header.get("format") != _FORMAT:
            raise ValueError(f"the first line does not say {_FORMAT}")
        spec: Json = {**header["media_spec"]}
        spec |= {key: tuple(spec[key]) for key in ("mean", "std")}
        tokenizer = blobs.tokenizer(header["tokenizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of episodes ({_cause(error)})") from None
    records: list[Record] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(_record(json.loads(line), blobs))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no episode ({_cause(error)})") from None
    return Recording(tokenizer, MediaSpec(**spec), records)


def _blobs(path: Path) -> Blobs:
    return Blobs(path.with_suffix(".files"))


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _drop_torn_line(file: BinaryIO) -> int:
    """The length of what is whole."""
    end = file.seek(0, 2)
    whole = end
    while whole:
        begin = max(0, whole - 65536)
        file.seek(begin)
        newline = file.read(whole - begin).rfind(b"\n")
        if newline >= 0:
            whole = begin + newline + 1
            break
        whole = begin
    if whole < end:
        file.truncate(whole)
    return whole


def _record_json(record: Record, blobs: Blobs) -> Json:
    return {
        "env": record.env,
        "version": record.version,
        "task": record.task,
        "group": record.group,
        "seed": record.seed,
        "weights": record.weights,
        "reward": record.reward,
        "advantage": record.advantage,
        "policy_logprobs": record.policy_logprobs,
        "trace": _trace_json(record.trace, blobs),
    }


def _record(value: Json, blobs: Blobs) -> Record:
    logprobs = tuple(tuple(agent) for agent in value["policy_logprobs"])
    fields: Json = {"policy_logprobs": logprobs, "trace": _trace(value["trace"], blobs)}
    return Record(**{**value, **fields})


class _Messages:
    """Hands out a number for every message, the same for the same one."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._numbers: dict[int, int] = {}
        self.written: list[Json] = []

    def number(self, message: Message) -> int:
        if id(message) not in self._numbers:
            self._numbers[id(message)] = len(self.written)
            self.written.append(_message_json(message, self._blobs))
        return self._numbers[id(message)]


def _trace_json(trace: Trace, blobs: Blobs) -> Json:
    messages = _Messages(blobs)
    return {
        "role": trace.role,
        "status": trace.status,
        "error": trace.error,
        "broke": trace.broke,
        "trainable": trace.trainable,
        "signals": trace.signals,
        "reasons": trace.reasons,
        "final_text": trace.final_text,
        "dialogue": [messages.number(message) for message in trace.messages],
        "turns": [_turn_json(turn, trace, messages, blobs) for turn in trace.turns],
        "messages": messages.written,
        "media": [blobs.put_item(item) for item in trace.media],
        "tokens": trace.tokens,
        "loss_mask": trace.loss_mask,
        "logprobs": trace.logprobs,
    }


def _trace(value: Json, blobs: Blobs) -> Trace:
    messages = [_message(message, blobs) for message in value["messages"]]
    tokens, logprobs = tuple(value["tokens"]), tuple(value["logprobs"])
    return Trace(
        role=value["role"],
        messages=tuple(messages[int(number)] for number in value["dialogue"]),
        tokens=tokens,
        loss_mask=tuple(value["loss_mask"]),
        logprobs=logprobs,
        media=tuple(blobs.item(name) for name in value["media"]),
        turns=tuple(_turn(turn, tokens, logprobs, messages, blobs) for turn in value["turns"]),
        status=cast(Status, value["status"]),
        final_text=value["final_text"],
        trainable=value["trainable"],
        error=value["error"],
        signals=value["signals"],
        reasons=value["reasons"],
        broke=value["broke"],
    )


def _turn_json(turn: Turn, trace: Trace, messages: _Messages, blobs: Blobs) -> Json:
    span = slice(turn.prompt_len, turn.prompt_len + len(turn.ids))
    extends = trace.tokens[span] == turn.ids and trace.logprobs[span] == turn.logprobs
    return {
        "prompt_len": turn.prompt_len,
        # The number of sampled tokens, where they stand in the agent's own; otherwise the tokens.
        "sampled": len(turn.ids) if extends else [turn.ids, turn.logprobs],
        "weight_version": turn.weight_version,
        "message": messages.number(turn.message),
        "results": [messages.number(message) for message in turn.results],
        "children": [_trace_json(child, blobs) for child in turn.children],
        "started": turn.started,
        "generated": turn.generated,
        "ended": turn.ended,
    }


def _turn(
    value: Json, tokens: tuple[int, ...], logprobs: tuple[float, ...], messages: Sequence[Message], blobs: Blobs
) -> Turn:
    begin, sampled = value["prompt_len"], value["sampled"]
    if isinstance(sampled, int):
        ids, drawn = tokens[begin : begin + sampled], logprobs[begin : begin + sampled]
    else:
        ids, drawn = map(tuple, sampled)
    return Turn(
        prompt_len=begin,
        ids=ids,
        logprobs=drawn,
        weight_version=value["weight_version"],
        message=messages[int(value["message"])],
        results=tuple(messages[int(number)] for number in value["results"]),
        children=tuple(_trace(child, blobs) for child in value["children"]),
        started=value["started"],
        generated=value["generated"],
        ended=value["ended"],
    )


def _message_json(message: Message, blobs: Blobs) -> Json:
    value: Json = {"role": message.role, "content": [_part_json(part, blobs) for part in message.content]}
    if message.tool_calls:
        value["tool_calls"] = [dataclasses.asdict(call) for call in message.tool_calls]
    rest = {"reasoning": message.reasoning, "tool_call_id": message.tool_call_id, "name": message.name}
    return value | {key: text for key, text in rest.items() if text}


def _message(value: Json, blobs: Blobs) -> Message:
    return Message(
        role=cast(Role, value["role"]),
        content=tuple(_part(part, blobs) for part in value["content"]),
        reasoning=value.get("reasoning", ""),
        tool_calls=tuple(ToolCall(**call) for call in value.get("tool_calls", ())),
        tool_call_id=value.get("tool_call_id", ""),
        name=value.get("name", ""),
    )


def _part_json(part: Part, blobs: Blobs) -> str | Json:
    match part:
        case str():
            return part
        case Image():
            return {"image": blobs.put_image(part)}
        case Clip():
            return {"clip": blobs.put_clip(part)}
        case Video(file=bytes() as data):
            return {"video": blobs.put_video(data)}
        case Video():
            return {"video_file": str(part.file)}


def _part(value: str | Json, blobs: Blobs) -> Part:
    match value:
        case str():
            return value
        case {"image": str(name)}:
            return blobs.image(name)
        case {"clip": str(name)}:
            return blobs.clip(name)
        case {"video": str(name)}:
            return Video(blobs.video(name))
        case {"video_file": str(name)}:
            return Video(Path(name))
        case _:
            raise ValueError(f"no part of a message: {sorted(value)}")
