"""Live multi-turn tasks with tools in one process: ours, verifiers in-process, and two floors; see rollout_subjects/.

Every run is a process of its own; subjects take turns within a round, and medians over the rounds are reported. Turns
are compared by processor time, which other work on the machine disturbs least. The last line says, at the most tasks,
how many times the processor time of our turn verifiers needs; ratios to the floors stand beside it. Writes
results/rollouts.json and results/rollouts.png. Takes some ten minutes and 4 GB; `rollouts.py 1000 10000` does less.

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
Row = dict[str, float]


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


def run(subject: str, tasks: int, tokens: Path) -> Row:
    python = PEER / "bin" / "python" if subject == "verifiers_env" else Path(sys.executable)
    command = [str(python), str(SUBJECTS / f"{subject}.py"), str(tasks), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(f"{tasks:>7} {subject:<13} {row}", file=sys.stderr)
    return row


def measure(sizes: list[int]) -> dict[str, list[Row]]:
    """By subject, the medians for every number of tasks."""
    out: dict[str, list[Row]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        tokens = ranks(Path(folder))
        for tasks in sizes:
            rounds = [{name: run(name, tasks, tokens) for name in NAMES} for _ in range(ROUNDS[tasks])]
            for name in NAMES:
                rows = [each[name] for each in rounds]
                out[name].append({key: statistics.median(row[key] for row in rows) for key in rows[0]})
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
    load = os.getloadavg()[0]
    rows = measure(sizes)
    most = {name: each[-1] for name, each in rows.items()}
    ours, peer = most["ours"]["cpu_us_a_turn"], most["verifiers_env"]["cpu_us_a_turn"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    record: dict[str, Any] = {
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours,
        "unit": "microseconds of processor time a turn",
        "tasks": sizes[-1],
        "times_the_tokens_floor": ours / most["tokens"]["cpu_us_a_turn"],
        "times_the_bare_floor": ours / most["bare"]["cpu_us_a_turn"],
        "load_before": round(load, 2),
        "commit": commit.stdout.strip(),
        "command": " ".join(["bench/rollouts.py", *sys.argv[1:]]),
        "rows": rows,
    }
    results = ROOT / "results"
    (results / "rollouts.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, results / "rollouts.png")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
