"""Nested episodes on a deterministic engine, trained on in steps of whoever ends first, by a process that is killed
again and again. Run as `killed.py FOLDER EPISODES KILLS SEED`; prints what was trained, beside a run without kills.

The trainer stands for any trainer: its checkpoint holds the number of the next step and all it has learnt, and replaces
the former one in one move. A process is killed when all processes together have made a certain number of moves (answers
of the engine, episodes trained on), drawn in advance, so that the moments lie all over the work.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from baltoro.agent.engine import Completion, Engine, Sampling
from baltoro.agent.loop import Limits, run_agent
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.tool import CallContext, Tool, ToolResult
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence, ToolSpec, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.journal import Journal
from baltoro.rollout.manager import ManagerConfig, Rollout, RolloutManager
from baltoro.rollout.partial import Resumable, resumable

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})
HALF = (0.5, 0.5, 0.5)
SPEC = MediaSpec(patch_size=4, merge=2, patch_limit=64, side_limit=16, mean=HALF, std=HALF, frames_per_chunk=4)
LIMITS = Limits(max_turns=6, max_context_tokens=8000, max_turn_tokens=400)
QUERY: dict[str, object] = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
LIVE, STEP = 28, 20


class Oracle:
    """Says what follows from the prompt and the seed alone; the version of its weights is all that changes."""

    def __init__(self, moves: Path) -> None:
        self.version = 0
        self._moves = os.open(moves, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def move(self, what: object) -> None:
        os.write(self._moves, f"{what}\n".encode())

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        draw = random.Random(f"{prompt.ids} {sampling.seed} {role}")
        await asyncio.sleep(draw.random() * 0.004)
        deep = role.count("sub")
        names = ["look"] * 3 + ["delegate"] * (2 - deep) * 2
        count = draw.choice([0, 0, 1, 1, 2 - deep])
        calls: list[tuple[str, dict[str, object]]] = [
            (draw.choice(names), {"query": f"{draw.randrange(10**6)}"}) for _ in range(count)
        ]
        text = completion_text(f"{draw.randrange(10**6)}", reasoning="hm", calls=calls)
        said = await ScriptedEngine(TOKENIZER, [text]).generate(prompt, sampling, role)
        self.move(sampling.seed)
        return replace(said, logprobs=[-draw.random() for _ in said.ids], weight_version=self.version)


@dataclass
class Look:
    """Has an effect outside that must not come twice, were it not that a process may die between it and the journal."""

    spec = ToolSpec("look", "looks", QUERY)
    sequential = False
    called: Path

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        with self.called.open("a") as file:
            file.write(f"{context.seed}\n")
        await asyncio.sleep(0.001)
        return ToolResult((f"{arguments['query']} is {context.seed % 997}",))


@dataclass
class Delegate:
    """Runs an agent below; it is part of the program, not of the world, and so is run again."""

    spec = ToolSpec("delegate", "asks somebody else", QUERY)
    sequential = False
    engine: Engine
    tools: list[Tool]
    role: str

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        trace = await agent(self.engine, self.tools, self.role, str(arguments["query"]), context.seed)
        return ToolResult((trace.final_text,), (trace,))


async def agent(engine: Engine, tools: list[Tool], role: str, task: str, seed: int) -> Trace:
    below = [*tools, Delegate(engine, tools, f"sub{role}")] if role.count("sub") < 2 else tools
    return await run_agent(
        engine,
        TOKENIZER,
        SPEC,
        role=role,
        messages=[user(task)],
        tools=below,
        limits=LIMITS,
        sampling=Sampling(400, seed=seed),
        declare_tools=False,
    )


def told(trace: Trace) -> object:
    """All that training reads, apart from weight versions."""
    return trace.role, trace.status, trace.tokens, trace.loss_mask, trace.logprobs, [told(c) for c in trace.children]


def versions(trace: Trace) -> list[list[int]]:
    """Of the turns of every agent."""
    return [[turn.weight_version for turn in trace.turns], *(v for child in trace.children for v in versions(child))]


@dataclass
class Trainer:
    folder: Path
    episodes: int

    async def run(self) -> None:
        checkpoint, todo = self.folder / "checkpoint.json", [f"episode {i}" for i in range(self.episodes)]
        state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "trained": []}
        engine = Oracle(self.folder / "moves")
        look = Look(self.folder / "called")
        async with Journal.open(self.folder / "journal.sqlite") as journal:
            while len(state["trained"]) < self.episodes:
                engine.version = step = state["step"]
                journal.forget(step)
                manager = RolloutManager(engine, ManagerConfig(calls=32))
                async with manager.run():
                    mine = [id for id, claimed in journal.claims.items() if claimed == step]
                    free = [id for id in todo if id not in journal.claims]
                    assert mine or free, "episodes were claimed and never trained on"
                    running = {
                        id: await manager.submit(id, self.rollout(journal, look, id)) for id in mine or free[:LIVE]
                    }
                    ended = []
                    waits = asyncio.as_completed([each.ended() for each in running.values()])
                    for each in waits:
                        ended.append(await each)
                        if len(ended) == min(STEP, len(running)):
                            break
                    await manager.cut()
                    for each in waits:
                        await each
                if not mine:
                    await journal.claim(step, [each.episode for each in ended])
                for each in ended:
                    engine.move("trained")
                    time.sleep(0.002)
                    assert each.trace is not None
                    digest = hashlib.sha256(repr(told(each.trace)).encode()).hexdigest()
                    state["trained"].append([each.episode, digest, versions(each.trace)])
                state["step"] = step + 1
                new = checkpoint.with_suffix(".new")
                new.write_text(json.dumps(state))
                os.replace(new, checkpoint)

    def rollout(self, journal: Journal, look: Look, id: str) -> Rollout:
        async def one(episode: Resumable) -> Trace:
            seed = int(id.split()[1])
            return await agent(episode, [episode.tool(look)], "agent", id, seed)

        return resumable(journal, one)


def lines(path: Path, but: str = "") -> list[str]:
    return [line for line in path.read_text().split() if line != but] if path.exists() else []


def start(folder: Path, episodes: int) -> int:
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return child
    try:
        asyncio.run(Trainer(folder, episodes).run())
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(folder: Path, episodes: int, kills: int, seed: int) -> None:
    calm, rough = folder / "calm", folder / "rough"
    calm_code = os.waitpid(start(calm, episodes), 0)[1]
    draw = random.Random(seed)
    moments = sorted(draw.randrange(len(lines(calm / "moves"))) for _ in range(kills))
    killed = 0
    for moment in moments:
        child = start(rough, episodes)
        while len(lines(rough / "moves")) < moment and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    rough_code = os.waitpid(start(rough, episodes), 0)[1]
    report = {
        name: {
            "code": code,
            "trained": json.loads((path / "checkpoint.json").read_text())["trained"],
            "asked": len(lines(path / "moves", "trained")),
            "questions": len(set(lines(path / "moves", "trained"))),
            "called": len(lines(path / "called")),
            "calls": len(set(lines(path / "called"))),
        }
        for name, path, code in (("calm", calm, calm_code), ("rough", rough, rough_code))
    }
    print(json.dumps({**report, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
