"""Ten thousand episodes with tools, children and pooled sandboxes on an engine that does everything wrong. Simulated
time: what takes an engine hours takes a test seconds."""

import asyncio
import gc
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from baltoro.agent.chaos import Chaos, ChaosEngine
from baltoro.agent.engine import Completion, Engine, Sampling
from baltoro.agent.loop import Limits, derive_seed, run_agent
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.tool import CallContext, Tool, ToolResult
from baltoro.agent.trace import Trace
from baltoro.agent.virtual import run_virtual
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence, ToolSpec, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.manager import OUTCOMES, Episode, ManagerConfig, RolloutManager, Running
from baltoro.rollout.pool import Pool

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})
HALF = (0.5, 0.5, 0.5)
SPEC = MediaSpec(patch_size=4, merge=2, patch_limit=64, side_limit=16, mean=HALF, std=HALF, frames_per_chunk=4)
LIMITS = Limits(max_turns=3, max_context_tokens=900, max_turn_tokens=200)
EPISODES, SANDBOXES = 10_000, 60
SCHEMA: dict[str, object] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


class Model:
    """Calls one tool or the other, or answers; drawn from the seed."""

    def __init__(self) -> None:
        calls = [completion_text(calls=[(name, {"x": 1})]) for name in ("work", "ask", "ask")]
        both = completion_text(calls=[("work", {"x": 1}), ("ask", {"x": 2})])
        engine = ScriptedEngine(TOKENIZER, lambda prompt, role: "")
        self._ids = [[*engine._encode(text), TOKENIZER.im_end] for text in (*calls, both, "</think>ok", "</think>no")]  # pyright: ignore[reportPrivateUsage]
        self.inside = 0

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        self.inside += 1
        try:
            await asyncio.sleep(1)
        finally:
            self.inside -= 1
        ids = random.Random(sampling.seed).choice(self._ids if role == "agent" else self._ids[-2:])
        return Completion(ids, [-0.5] * len(ids), "stop", 0)


class Sandbox:
    def __init__(self) -> None:
        self.clean = True


@dataclass
class Work:
    """Takes a sandbox; some commands hang for a day, some break it. soiled: those that came in a broken state."""

    spec = ToolSpec("work", "", SCHEMA)
    sequential = False
    pool: Pool[Sandbox]
    soiled: list[Sandbox]

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        draw = random.Random(context.seed).random()
        async with self.pool.instance() as sandbox:
            if not sandbox.clean:  # an assertion would be one more failure of a tool
                self.soiled.append(sandbox)
            sandbox.clean = False
            await asyncio.sleep(86_400 if draw < 0.02 else 2)
            if draw > 0.95:
                raise OSError("the sandbox broke")
            sandbox.clean = True
        return ToolResult(("done",))


@dataclass
class Ask:
    spec = ToolSpec("ask", "", SCHEMA)
    sequential = False
    engine: Engine

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        trace = await agent(self.engine, [], "child", context.seed)
        return ToolResult((trace.final_text,), (trace,), error=trace.error)


async def agent(engine: Engine, tools: list[Tool], role: str, seed: int) -> Trace:
    return await run_agent(
        engine,
        TOKENIZER,
        SPEC,
        role=role,
        messages=[user("go")],
        tools=tools,
        limits=LIMITS,
        sampling=Sampling(200, seed=seed),
        declare_tools=False,
    )


@pytest.mark.timeout(300)
def test_ten_thousand_episodes_are_all_accounted_for() -> None:
    made = closed = 0
    soiled: list[Sandbox] = []

    async def make() -> Sandbox:
        nonlocal made
        await asyncio.sleep(3)
        made += 1
        return Sandbox()

    async def close(sandbox: Sandbox) -> None:
        nonlocal closed
        await asyncio.sleep(1)
        closed += 1

    def program(pool: Pool[Sandbox], number: int) -> object:
        async def rollout(episode: Episode) -> Trace:
            if number % 500 == 250:
                raise KeyError("a faulty program")
            return await agent(episode, [Work(pool, soiled), Ask(episode)], "agent", derive_seed(9, number))

        return rollout

    async def main() -> None:
        model = Model()
        chaos = Chaos(delay_s=2, drops=0.08, hangs=0.01, malformed=0.1, storm_every_s=200, storm_s=5)
        engine = ChaosEngine(model, TOKENIZER, chaos, seed=4)
        config = ManagerConfig(live=1000, calls=256, call_s=60, episode_s=1800)
        manager, pool = RolloutManager(engine, config), Pool(make, close, SANDBOXES)
        running: list[Running] = []
        async with pool.run(), manager.run():
            for number in range(EPISODES):
                each = await manager.submit(f"{number}", program(pool, number))  # pyright: ignore[reportArgumentType]
                running.append(each)
                if number % 100 == 7:
                    asyncio.get_running_loop().call_later(number % 13, each.cancel)
            assert manager.numbers()["live"] > 0
            ended = [await each.ended() for each in running]
        counted = Counter(each.outcome for each in ended)
        numbers = manager.numbers()
        assert manager.stats.outcomes == counted
        assert {outcome: numbers[f"outcomes_{outcome.replace(' ', '_')}"] for outcome in counted} == counted
        assert set(counted) <= set(OUTCOMES)
        assert counted.total() == manager.stats.submitted == EPISODES
        assert counted["crashed"] == 20
        assert 0 < counted["cancelled"] <= 100
        assert min(counted["completed"], counted["limit"], counted["timed out"]) > 50
        assert {"Overloaded", "ConnectionError", "TimeoutError"} == set(manager.stats.faults)
        assert manager.permits.total == manager.permits.waiting.total() == manager.permits.running.total() == 0
        assert (numbers["live"], model.inside, pool.in_use, pool.idle) == (0, 0, 0, 0)
        assert made == closed
        assert pool.not_closed == soiled == []
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert any(child.status == "completed" for each in ended if each.trace for child in each.trace.children)

    run_virtual(main())
    gc.collect()


def test_a_stuck_child_never_holds_up_its_siblings() -> None:
    """Five hundred episodes on 64 permits; one child of every tenth hangs for ever in the engine's hands."""

    class Sticky(Model):
        async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
            if role == "stuck":
                await asyncio.get_running_loop().create_future()
            return await super().generate(prompt, sampling, role)

    async def family(episode: Episode, stuck: bool) -> Trace:
        async with asyncio.TaskGroup() as group:
            children = [group.create_task(agent(episode, [], "child", seed)) for seed in range(5)]
            last = group.create_task(agent(episode, [], "stuck" if stuck else "child", 5))
            for child in children:
                finished.append(((await child).status, asyncio.get_running_loop().time()))
        return last.result()

    finished: list[tuple[str, float]] = []

    async def main() -> None:
        manager = RolloutManager(Sticky(), ManagerConfig(calls=64, role_calls={"stuck": 8}, episode_s=3600))
        async with manager.run():
            running = [
                await manager.submit(f"{i}", lambda episode, stuck=i % 10 == 0: family(episode, stuck))
                for i in range(500)
            ]
            ended = [await each.ended() for each in running]
        assert Counter(each.outcome for each in ended) == {"completed": 450, "timed out": 50}
        # 2,950 calls of a second, 56 at once beside those that hang: 53 seconds.
        assert Counter(status for status, _ in finished) == {"completed": 2500}
        assert max(time for _, time in finished) < 60

    run_virtual(main())
