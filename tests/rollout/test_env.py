"""One environment, two ways to drive it: the agent loop, and steps from outside. Both see and earn the same."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from baltoro.agent.engine import Sampling
from baltoro.agent.loop import Limits
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.trace import media_hash
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Image, Message, ToolCall, assistant
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.desktop import env as desktop
from baltoro.rollout.env import Env, Session, Step, World
from baltoro.rollout.judge import Judge, Policy, Reward, Task
from baltoro.rollout.manager import ManagerConfig, RolloutManager
from baltoro.rollout.record import Record, Recording
from baltoro.rollout.toolset import toolset
from baltoro.rollout.verify import verify
from baltoro.world.desktop import HEIGHT, Desktop, DesktopTask

Call = tuple[str, dict[str, object]]


def gold(task: Task) -> list[list[Call]]:
    """Turns that solve a desktop task, the first with two calls."""
    desktop = Desktop(DesktopTask(tuple(task["buttons"]), tuple(task["order"]), task["word"]))
    turns: list[list[Call]] = []
    for button in task["order"]:
        x, y = desktop.centre(button)
        rows = task["buttons"].index(button) // 2
        turns += [[("scroll", {"rows": -9}), ("scroll", {"rows": rows})], [("click", {"x": x, "y": y})]]
    turns += [[("click", {"x": 20, "y": HEIGHT - 10})], [("type_text", {"text": task["word"]})]]
    return turns


def act(calls: list[Call], first: int) -> Message:
    return assistant(
        tool_calls=tuple(
            ToolCall(f"functions.{name}:{first + i}", name, json.dumps(arguments))
            for i, (name, arguments) in enumerate(calls)
        )
    )


def plain(messages: tuple[Message, ...]) -> list[object]:
    return [
        (m.role, m.tool_call_id, [media_hash(p) if isinstance(p, Image) else p for p in m.content]) for m in messages
    ]


def test_the_loop_and_the_steps_see_the_same(tokenizer: Tokenizer, media_spec: MediaSpec) -> None:
    task = desktop.sample(5)
    turns = gold(task)
    policy = Policy(tokenizer, media_spec, Sampling(200))

    async def by_the_loop() -> tuple[Record, list[object]]:
        done = 0
        texts: list[str] = []
        for calls in turns:
            texts.append(completion_text(calls=calls, first_index=done))
            done += len(calls)
        manager = RolloutManager(ScriptedEngine(tokenizer, [*texts, completion_text("done")]), ManagerConfig())
        async with manager.run():
            running = await manager.submit("0", lambda episode: desktop.rollout(episode, policy, task, 1))
            trace = (await running.ended()).trace
        assert trace
        record = Record("desktop", "1", task, "g", 1, trace, desktop.judge.weights, desktop.judge.reward(trace.signals))
        return record, [plain(turn.results) for turn in trace.turns]

    async def by_steps() -> list[Step]:
        session = Session(desktop)
        steps: list[Step] = []
        done = 0
        await session.reset(task, 1)
        assert [tool.name for tool in session.tools] == ["click", "type_text", "scroll"]
        for message in [*turns, []]:
            steps.append(await session.step(act(message, done) if message else assistant("done")))
            done += len(message)
        await session.close()
        return steps

    record, observed = asyncio.run(by_the_loop())
    steps = asyncio.run(by_steps())
    assert [plain(step.observation) for step in steps] == observed
    assert record.trace.signals == steps[-1].info["signals"] == {
        "progress": 1.0, "finished": 1.0, "done": 1.0, "actions": sum(map(len, turns)),
    }  # fmt: skip
    assert [step.reward for step in steps] == [0.0] * len(turns) + [1.0]
    assert [step.terminated for step in steps] == [False] * len(turns) + [True]
    assert verify(Recording(tokenizer, media_spec, [record]), lambda r: desktop.judge.again(r.task, r.trace)) == []


class Ledger:
    """Counts what is open."""

    def __init__(self) -> None:
        self.open = 0

    def env(self, judge: Judge | None = None, max_turns: int = 3) -> Env:
        @asynccontextmanager
        async def world(task: Task, seed: int) -> AsyncGenerator[World]:
            self.open += 1

            async def wait() -> str:
                """Wait."""
                await asyncio.sleep(1e9)
                return ""

            async def tell() -> str:
                """Tell the seed."""
                return f"{seed}"

            try:
                yield World(("go",), toolset(wait, tell, seconds=1e9), "be quick", lambda: {"seed": seed})
            finally:
                await asyncio.sleep(0)
                self.open -= 1

        judge = judge or Judge(Reward("even", lambda task, trace: (trace.signals["seed"] + 1) % 2))
        return Env("ledger", "1", lambda seed: {"n": seed}, world, judge, Limits(max_turns, 999, 100))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_a_session_gives_back_what_it_holds(ledger: Ledger) -> None:
    async def main() -> None:
        session = Session(ledger.env())
        with pytest.raises(ValueError, match="call reset"):
            await session.step(assistant("too early"))
        assert [m.role for m in await session.reset({}, 2)] == ["system", "user"]
        await session.reset({}, 4)
        assert ledger.open == 1
        step = await session.step(assistant("done"))
        assert (step.reward, step.terminated, step.truncated) == (1.0, True, False)
        with pytest.raises(ValueError, match="call reset"):
            await session.step(assistant("too late"))
        await session.close()
        await session.close()
        assert ledger.open == 0
        await session.reset({}, 3)
        assert (await session.step(assistant("done"))).reward == 0.0
        await session.close()
        assert ledger.open == 0

    asyncio.run(main())


def test_without_turns_left_it_is_truncated_and_judged(ledger: Ledger) -> None:
    async def main() -> None:
        session = Session(ledger.env())
        await session.reset({}, 2)
        steps = [await session.step(act([("tell", {})], i)) for i in range(3)]
        assert [(s.terminated, s.truncated, s.reward) for s in steps] == [(False, False, 0.0)] * 2 + [
            (False, True, 1.0)
        ]
        assert session.trace
        assert session.trace.status == "limit"
        await session.close()

    asyncio.run(main())


def test_a_reward_that_nobody_could_judge_is_nan(ledger: Ledger) -> None:
    async def main() -> None:
        session = Session(ledger.env(Judge(Reward("broken", lambda task, trace: task["gold"]))))
        await session.reset({}, 2)
        step = await session.step(assistant("done"))
        assert math.isnan(step.reward)
        assert step.info["reasons"] == {"broken": "failed: KeyError: 'gold'"}
        await session.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancelled", "timed out", "crashed"])
def test_whatever_ends_an_episode_its_world_is_closed(
    ledger: Ledger, tokenizer: Tokenizer, media_spec: MediaSpec, how: str
) -> None:
    """In the middle of a tool call; a crash is a failing agent."""
    env = ledger.env()
    policy = Policy(tokenizer, media_spec, Sampling(100))

    async def fails(*_: object) -> object:
        raise RuntimeError("no agent")

    if how == "crashed":
        env = replace(env, agent=fails)  # pyright: ignore[reportArgumentType]

    async def main() -> None:
        engine = ScriptedEngine(tokenizer, [completion_text(calls=[("wait", {})])])
        manager = RolloutManager(engine, ManagerConfig(episode_s=0.2 if how == "timed out" else None))
        async with manager.run():
            running = await manager.submit("0", lambda episode: env.rollout(episode, policy, {}, 1))
            if how == "cancelled":
                while not (manager.stats.turns and ledger.open):
                    await asyncio.sleep(0.01)
                running.cancel()
            assert (await running.ended()).outcome == how
        assert ledger.open == 0

    asyncio.run(main())


def test_seeds_belong_to_the_episode(ledger: Ledger, tokenizer: Tokenizer, media_spec: MediaSpec) -> None:
    policy = Policy(tokenizer, media_spec, Sampling(100, seed=5))
    script: Callable[[str, str], str] = lambda prompt, role: completion_text("done")  # noqa: E731

    async def main() -> list[float | None]:
        env, engine = ledger.env(), ScriptedEngine(tokenizer, script)
        traces = [await env.rollout(engine, policy, {}, seed) for seed in (6, 7)]
        assert engine.samplings[0].seed != engine.samplings[1].seed
        return [env.judge.reward(trace.signals) for trace in traces]

    assert asyncio.run(main()) == [1.0, 0.0]
