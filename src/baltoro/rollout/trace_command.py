"""`baltoro trace`: recorded episodes verified, shown, exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baltoro.rollout.conform import load_env
from baltoro.rollout.export import write_export
from baltoro.rollout.perfetto import write_perfetto
from baltoro.rollout.record import Record, read_episodes
from baltoro.rollout.verify import evidence, verify
from baltoro.rollout.viewer import write_view


@dataclass(frozen=True)
class TraceSettings:
    """`baltoro trace`. env: the file of the environment, to judge again. to: the file to write. form: of an export."""

    env: Path | None = None
    to: Path | None = None
    form: Literal["slime", "trl"] | None = None


def _verify(file: Path, settings: TraceSettings) -> int:
    recording = read_episodes(file)
    judge = load_env(settings.env).judge if settings.env else None

    def again(record: Record) -> dict[str, float]:
        return judge.again(record.task, record.trace) if judge else {}

    findings = verify(recording, again)
    for finding in findings:
        print(finding)
    print("role            agents trainable turns  without: ids log-probabilities version  broken prefixes")
    for role, row in evidence(recording.records).items():
        print(
            f"{role:15} {row.agents:6} {row.trainable:9} {row.turns:5} {row.without_ids:13} {row.without_logprobs:17}"
            f" {row.without_version:7} {row.broken:16}"
        )
    print(f"{len(recording.records)} episodes, {len(findings) or 'no'} findings")
    return 1 if findings else 0


def _view(file: Path, settings: TraceSettings) -> int:
    target = settings.to or file.with_suffix(".html")
    write_view(read_episodes(file), target, file.name)
    print(target)
    return 0


def _perfetto(file: Path, settings: TraceSettings) -> int:
    target = settings.to or file.with_suffix(".perfetto.json")
    write_perfetto(read_episodes(file).records, target)
    print(f"{target}; open it in https://ui.perfetto.dev or chrome://tracing")
    return 0


def _export(file: Path, settings: TraceSettings) -> int:
    if settings.form is None:
        raise ValueError("an export needs a form; say form=slime or form=trl")
    target = settings.to or file.with_suffix(f".{settings.form}.jsonl")
    lines, left_out = write_export(read_episodes(file), target, settings.form)
    print(f"{target}: {lines} agents" + (f"; left out, because pixels cannot cross: {left_out}" if left_out else ""))
    return 0


_TRACE = {"verify": _verify, "view": _view, "perfetto": _perfetto, "export": _export}


def trace(subject: str, file: Path, settings: TraceSettings) -> int:
    """Its exit status. Raises ValueError, OSError."""
    return _TRACE[subject](file, settings)
