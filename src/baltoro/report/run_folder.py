"""What a run leaves on disk: one folder, locked while a run writes to it, every file whole at any moment."""

import contextlib
import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any

from baltoro import __version__
from baltoro.rollout.record import replacing


def checkpoint_path(run: Path, stage: str) -> Path:
    """Where a run's folder holds what a stage learned."""
    return run / "checkpoints" / f"{stage}.safetensors"


class RunFolder:
    """`results` grows as stages end; `metrics.jsonl` and `live.jsonl` get one line a step."""

    def __init__(self, path: Path):
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        (path / "checkpoints").mkdir(exist_ok=True)
        self._lock = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is in use by another run; wait for it or choose another folder=") from None
        results = path / "results.json"
        self.results: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"stages": {}}
        self._metrics: list[dict[str, Any]] = read_lines(path / "metrics.jsonl")

    def check_config(self, config: dict[str, Any]) -> None:
        """A folder belongs to one configuration: another one would resume into nonsense. Raises ValueError."""
        path = self.path / "config.json"
        if path.exists():
            before = json.loads(path.read_text())
            changed = sorted(key for key in before.keys() | config.keys() if before.get(key) != config.get(key))
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another {changed[0]}; choose another folder= or delete this one"
                )
        else:
            with replacing(path) as scratch:
                scratch.write_text(json.dumps(config, indent=1))

    def begin_stage(self, stage: str, done: int) -> None:
        """Forget what was logged behind the checkpoint from which the stage goes on."""
        for name in ("metrics.jsonl", "live.jsonl"):
            kept = [r for r in read_lines(self.path / name) if r["stage"] != stage or r["step"] <= done]
            with replacing(self.path / name) as scratch:
                scratch.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._metrics = read_lines(self.path / "metrics.jsonl")

    def log(self, stage: str, **record: float) -> None:
        line = {"stage": stage, **record}
        self._metrics.append(line)
        self._append("metrics.jsonl", line)

    def log_live(self, stage: str, step: int, text: str) -> None:
        self._append("live.jsonl", {"stage": stage, "step": step, "text": text})

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        return [record for record in self._metrics if record["stage"] == stage]

    def end_stage(self, stage: str, what: str, seconds: float, tokens: int, measure: str) -> None:
        values = [record[measure] for record in self.metrics(stage)]
        self.update(
            stages=self.results["stages"]
            | {
                stage: {
                    "what": what,
                    "wall_s": seconds,
                    "tokens": tokens,
                    "loss_first": values[0],
                    "loss_last": values[-1],
                }
            }
        )

    def update(self, **values: Any) -> None:
        self.results |= values
        self.write_json("results.json", self.results)

    def write_json(self, name: str, value: Any) -> None:
        with replacing(self.path / name) as scratch:
            scratch.write_text(json.dumps(value, indent=1))

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a last line that was cut off by a crash is dropped."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def commit() -> str:
    """The commit of the source tree, or the installed version outside of one."""
    try:
        where = Path(__file__).parent
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=where, capture_output=True, text=True)
    except FileNotFoundError:
        return __version__
    return out.stdout.strip() or __version__
