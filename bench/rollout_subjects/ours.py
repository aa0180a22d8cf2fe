"""Ours: episodes of the rollout manager, each the one agent loop with a tool and its schema, on exact tokens."""

import asyncio
import sys
from pathlib import Path

from work import FINDING, QUESTION, REASONING, TOOL, TURNS, Work, arguments

from baltoro.agent.engine import Completion, Engine, Sampling
from baltoro.agent.loop import Limits, run_agent
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.tool import CallContext, ToolResult
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence, ToolSpec, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.manager import Episode, ManagerConfig, Rollout, RolloutManager

HALF = (0.5, 0.5, 0.5)
SPEC = MediaSpec(patch_size=4, merge=2, patch_limit=64, side_limit=16, mean=HALF, std=HALF, frames_per_chunk=4)
# As many as an engine takes at once; one that answers at once is kept busy by few.
CALLS = 128
LIMITS = Limits(max_turns=TURNS + 2, max_context_tokens=8000, max_turn_tokens=400)


class LookUp:
    spec = ToolSpec(TOOL["name"], TOOL["description"], TOOL["parameters"])
    sequential = False

    def __init__(self, work: Work) -> None:
        self._work = work

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        return ToolResult((await self._work.look_up(**arguments),))  # pyright: ignore[reportArgumentType]


class Turns:
    """Knows by the length of the prompt which turn it is."""

    def __init__(self, completions: dict[int, Completion]) -> None:
        self._completions = completions

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        await asyncio.sleep(0)
        return self._completions[len(prompt.ids)]


async def completions(tokenizer: Tokenizer) -> dict[int, Completion]:
    """By the length of the prompt."""

    class AtOnce(LookUp):
        async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
            return ToolResult((FINDING,))

    texts = [
        completion_text(reasoning=REASONING, calls=[("look_up", arguments(t))], first_index=t) for t in range(TURNS)
    ]
    engine = ScriptedEngine(tokenizer, [*texts, completion_text("1874")])
    trace = await agent(engine, tokenizer, AtOnce(Work(1)), 0)
    assert trace.status == "completed"
    return {turn.prompt_len: Completion(list(turn.ids), [-0.5] * len(turn.ids), "stop", 0) for turn in trace.turns}


async def agent(engine: Engine, tokenizer: Tokenizer, tool: LookUp, seed: int) -> Trace:
    return await run_agent(
        engine,
        tokenizer,
        SPEC,
        role="agent",
        messages=[user(QUESTION)],
        tools=[tool],
        limits=LIMITS,
        sampling=Sampling(400, seed=seed),
        declare_tools=False,
        trainable=True,
    )


async def main(tasks: int, ranks: Path) -> None:
    tokenizer = Tokenizer.load(ranks)
    engine = Turns(await completions(tokenizer))
    work = Work(tasks)
    tool = LookUp(work)
    manager = RolloutManager(engine, ManagerConfig(calls=CALLS))

    def rollout(seed: int) -> Rollout:
        async def one(episode: Episode) -> Trace:
            return await agent(episode, tokenizer, tool, seed)

        return one

    async with manager.run():
        async with work.lags():
            running = [await manager.submit(str(i), rollout(i)) for i in range(tasks)]
            await work.everybody.wait()
        work.all_live()
        for each in running:
            each.cancel()
    work.report()
    assert manager.stats.outcomes == {"cancelled": tasks}


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
