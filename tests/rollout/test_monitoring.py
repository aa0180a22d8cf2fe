"""What other programs and the terminal show of episodes, against times and counts worked by hand."""

import asyncio
import io
import json
from pathlib import Path

from rich.console import Console

from baltoro.agent.engine import Completion, Sampling
from baltoro.agent.trace import Trace, Turn
from baltoro.chat.messages import TokenSequence, ToolCall, assistant
from baltoro.rollout.live import table, watched
from baltoro.rollout.manager import Episode, ManagerConfig, RolloutManager
from baltoro.rollout.perfetto import write_perfetto
from baltoro.rollout.record import Record


def agent(role: str, *turns: tuple[float, float, float, tuple[Trace, ...]]) -> Trace:
    call = ToolCall("functions.assign_task:0", "assign_task", '{"prompt": "x"}')
    said = [
        Turn(7, (1, 2), (-0.5, -0.5), 3, assistant(tool_calls=(call,) * bool(children)), (), children, *times)
        for *times, children in turns
    ]
    return Trace(role, (), (), (), (), (), tuple(said), "completed", "", False)


def test_slices_by_hand(tmp_path: Path) -> None:
    child = agent("subagent", (1.25, 2.0, 2.0, ()))
    root = agent("orchestrator", (0.0, 1.0, 2.5, (child, child)), (2.5, 3.0, 3.0, ()))
    record = Record("wide", "1", {}, "g", 5, root, reward=0.5)
    write_perfetto([record, record], tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    first = [event for event in trace["traceEvents"] if event["pid"] == 1]
    assert len(trace["traceEvents"]) == 2 * len(first)
    names = {event["tid"]: event["args"]["name"] for event in first if event["ph"] == "M"}
    assert names == {
        0: "wide g seed 5, reward 0.5", 1: "0 orchestrator", 2: "0.0 subagent", 3: "0.1 subagent",
    }  # fmt: skip
    slices = [(e["tid"], e["name"], e["ts"], e["dur"]) for e in first if e["ph"] == "X"]
    assert slices == [
        (1, "turn 0", 0.0, 2.5e6),
        (1, "model", 0.0, 1e6),
        (1, "assign_task", 1e6, 1.5e6),
        (1, "turn 1", 2.5e6, 0.5e6),
        (1, "model", 2.5e6, 0.5e6),
        (2, "turn 0", 1.25e6, 0.75e6),
        (2, "model", 1.25e6, 0.75e6),
        (3, "turn 0", 1.25e6, 0.75e6),
        (3, "model", 1.25e6, 0.75e6),
    ]


class Quick:
    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        await asyncio.sleep(0.01)
        return Completion([1, 2], [0.0, 0.0], "stop", 0)


def watch(terminal: bool) -> str:
    async def rollout(episode: Episode) -> Trace:
        for _ in range(3):
            await episode.generate(TokenSequence([1]), Sampling(1), "agent")
        return agent("agent")

    async def main() -> str:
        out = io.StringIO()
        console = Console(file=out, width=80, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"})
        manager = RolloutManager(Quick(), ManagerConfig(calls=2))
        async with manager.run(), watched(manager, console, lambda: {"pages_used": 7.0, "waiting": 0.0}):
            running = [await manager.submit(f"{n}", rollout) for n in range(4)]
            for each in running:
                await each.ended()
        return out.getvalue()

    return asyncio.run(main())


def test_a_manager_is_watched() -> None:
    rows = [[cell.strip() for cell in line.split("│")] for line in watch(terminal=True).splitlines()]
    shown = {row[1]: row[2] for row in rows if len(row) == 5}
    counts = {"submitted": "4", "turns": "12", "tokens": "24", "outcomes completed": "4", "calls limit": "2"}
    assert shown.items() >= {**counts, "engine pages used": "7"}.items()


def test_on_a_pipe_it_is_a_line_in_the_end() -> None:
    """Of a second, where lines come every five."""
    (line,) = watch(terminal=False).splitlines()
    head = "rollouts:  submitted 4  outcomes completed 4  turns 12  tokens 24  calls limit 2  engine pages used 7  lag"
    assert line.startswith(head)
    assert line.isprintable()


def test_rates_are_a_second() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table({"turns": 30.0, "lag_p99_s": 0.25, "faults_x": 0.0}, {"turns": 20.0, "lag_p99_s": 0.0}))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "+20" in text  # ten in half a second
    assert "250.0 ms" in text
    assert "faults" not in text
