"""Live multi-turn tasks with tools in one process: ours, verifiers in-process, and two floors; see rollout_subjects/.

Every run is a process of its own; subjects take turns within a round, and medians over the rounds are reported. Turns
are compared by processor time, which other work on the machine disturbs least. The last line says, at the most tasks
that both held, how many times the processor time of our turn verifiers needs; ratios to the floors stand beside it.
Writes results/rollouts.json and results/rollouts.png. Takes some fifteen minutes and 4 GB; `rollouts.py 1000` measures
that number of tasks anew and keeps the rest.

verifiers 0.1.9.post3 runs in an environment of its own, for it needs old openai and mcp packages; it is installed there
once.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ROOT / "bench" / "rollout_subjects"
PEER = ROOT / ".venv-bench" / "verifiers"
PINS = ["verifiers==0.1.9.post3", "openai<2", "mcp<1.27"]
sys.path.insert(0, str(SUBJECTS))

from work import FINDING, QUESTION, REASONING, TURNS, arguments  # noqa: E402

from baltoro.chat.tokenizer import Tokenizer  # noqa: E402

NAMES = {
    "ours": "Baltoro: manager, agent loop, exact tokens",
    "verifiers_env": "verifiers 0.1.9.post3: ToolEnv.generate, messages",
    "tokens": "floor: the same tokens by hand",
    "bare": "floor: asyncio alone, no tokens",
}
ROUNDS = {1_000: 5, 10_000: 3, 100_000: 1}
LONGEST_S = 1200
RESULTS = ROOT / "results" / "rollouts.json"
Row = dict[str, Any]


def ranks(folder: Path) -> Path:
    texts = [QUESTION, REASONING, FINDING, *(json.dumps(arguments(turn)) for turn in range(TURNS))]
    path = folder / "ranks.tiktoken"
    Tokenizer.train(texts * 3, 1024).save(path)
    return path


def install_peer() -> None:
    if not (PEER / "installed").exists():
        print("installing verifiers, once", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        subprocess.run([str(PEER / "bin" / "python"), "-m", "pip", "install", "-q", *PINS], check=True)
        (PEER / "installed").touch()


def run(subject: str, tasks: int, tokens: Path) -> Row | None:
    """None where it takes too long or fails."""
    python = PEER / "bin" / "python" if subject == "verifiers_env" else Path(sys.executable)
    command = [str(python), str(SUBJECTS / f"{subject}.py"), str(tasks), str(tokens)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LONGEST_S)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"{tasks:>7} {subject:<13} {type(error).__name__}", file=sys.stderr)
        return None
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(f"{tasks:>7} {subject:<13} {row}", file=sys.stderr)
    return row


def measure(tasks: int, commit: str) -> dict[str, Row]:
    """By subject, the medians over the rounds."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        tokens = ranks(Path(folder))
        rounds = [{name: run(name, tasks, tokens) for name in NAMES} for _ in range(ROUNDS[tasks])]
    out: dict[str, Row] = {}
    for name in NAMES:
        rows = [row for each in rounds if (row := each[name])]
        if rows:
            medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            out[name] = {**medians, "rounds": len(rows), "load_before": round(load, 2), "commit": commit}
    return out


def draw(rows: dict[str, list[Row]], path: Path) -> None:
    panels = [("kb_a_task", "memory of a live task, KB"), ("turns_s", "turns served a second")]
    panels += [("lag_p99_ms", "lateness of the loop, p99, ms"), ("cancel_s", "time to cancel all, s")]
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for name, label in NAMES.items():
            axis.plot([row["tasks"] for row in rows[name]], [row[key] for row in rows[name]], "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel="live tasks", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or list(ROUNDS)
    install_peer()
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    rows: dict[str, list[Row]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for tasks in sizes:
        for name, row in measure(tasks, commit).items():
            others = [each for each in rows.get(name, []) if each["tasks"] != tasks]
            rows[name] = sorted([*others, row], key=lambda each: each["tasks"])
    most = {name: {row["tasks"]: row["cpu_us_a_turn"] for row in each} for name, each in rows.items()}
    tasks = max(most["ours"].keys() & most["verifiers_env"].keys())
    ours, peer = most["ours"][tasks], most["verifiers_env"][tasks]
    record: dict[str, Any] = {
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours,
        "unit": "microseconds of processor time a turn",
        "tasks": tasks,
        "times_the_tokens_floor": ours / most["tokens"][tasks],
        "times_the_bare_floor": ours / most["bare"][tasks],
        "command": "bench/rollouts.py",
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, RESULTS.with_suffix(".png"))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
