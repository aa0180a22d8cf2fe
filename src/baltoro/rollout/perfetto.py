"""Recorded episodes as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing show: a process per
episode, a track per agent, turns and tool calls as slices."""

import json
from collections.abc import Iterable
from pathlib import Path

from baltoro.agent.trace import Trace
from baltoro.rollout.record import Json, Record, agents, replacing


def write_perfetto(records: Iterable[Record], target: Path) -> None:
    """Whole or not at all. OSError where the disk does not take it."""
    events = [event for number, record in enumerate(records, 1) for event in _episode(record, number)]
    with replacing(target) as scratch:
        scratch.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}))


def _episode(record: Record, process: int) -> list[Json]:
    reward = "none" if record.reward is None else f"{record.reward:g}"
    name = f"{record.env} {record.group} seed {record.seed}, reward {reward}"
    events: list[Json] = [_named("process_name", process, 0, name)]
    for track, (place, trace) in enumerate(agents(record.trace), 1):
        events.append(_named("thread_name", process, track, f"{place} {trace.role}"))
        events += _slices(trace, process, track)
    return events


def _slices(trace: Trace, process: int, track: int) -> list[Json]:
    """A turn with the time of the model and that of its tools inside."""
    events: list[Json] = []
    for number, turn in enumerate(trace.turns):
        facts = {"prompt tokens": turn.prompt_len, "sampled tokens": len(turn.ids), "weights": turn.weight_version}
        events.append(_slice(f"turn {number}", process, track, turn.started, turn.ended, facts))
        events.append(_slice("model", process, track, turn.started, turn.generated, {}))
        if turn.calls:
            names = ", ".join(call.name for call in turn.calls)
            calls = {call.id: call.arguments[:1000] for call in turn.calls}
            events.append(_slice(names, process, track, turn.generated, turn.ended, calls))
    return events


def _slice(name: str, process: int, track: int, begin: float, end: float, facts: Json) -> Json:
    """Times in microseconds."""
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": track,
        "ts": begin * 1e6,
        "dur": (end - begin) * 1e6,
        "args": facts,
    }


def _named(kind: str, process: int, track: int, name: str) -> Json:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"name": name}}
