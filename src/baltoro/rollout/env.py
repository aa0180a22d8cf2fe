"""Environments (appendix D): tasks, the world that an episode acts on, and a judge; driven by the agent loop, or turn
by turn from outside through `reset`, `step` and `close`.

Version 1 of the interface. Whatever an agent does is a call of a tool; what it observes are the parts of messages.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from baltoro.agent.engine import Engine
from baltoro.agent.loop import Limits, derive_seed, run_agent, run_calls
from baltoro.agent.tool import CallContext, Tool
from baltoro.agent.trace import Status, Trace, Turn
from baltoro.chat.messages import Message, Part, ToolSpec, system, tool_result, user
from baltoro.rollout.judge import Bench, Judge, Policy, Reward, Task, metric


def _no_facts() -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, eq=False)
class World:
    """What one episode acts on. prompt: the first observation. system: the system prompt, left out where empty. facts:
    what is true of the world by now, as numbers by name; at the end they become signals, which the judge may read."""

    prompt: tuple[Part, ...]
    tools: Sequence[Tool] = ()
    system: str = ""
    facts: Callable[[], Mapping[str, float]] = _no_facts

    @property
    def opening(self) -> list[Message]:
        return [*([system(self.system)] if self.system else []), user(*self.prompt)]


Open = Callable[[Task, int], AbstractAsyncContextManager[World]]
"""(task, seed) to a fresh world. What is acquired is given back on leaving, whatever happened in between."""

Agent = Callable[[Engine, Policy, World, Limits], Awaitable[Trace]]
"""How agents work in a world: alone, as a swarm, or as a program of their own behind the gateway."""


async def alone(engine: Engine, policy: Policy, world: World, limits: Limits) -> Trace:
    return await run_agent(
        engine,
        policy.tokenizer,
        policy.media_spec,
        role=policy.role,
        messages=world.opening,
        tools=world.tools,
        limits=limits,
        sampling=policy.sampling,
        declare_tools=policy.declare_tools,
        trainable=policy.trainable,
        thinking=policy.thinking,
    )


@dataclass(frozen=True, eq=False)
class Env:
    """A versioned family of tasks. sample: a task by its seed. version: changes when the same task would go another
    way."""

    name: str
    version: str
    sample: Callable[[int], Task]
    open: Open
    judge: Judge
    limits: Limits
    agent: Agent = alone

    async def rollout(self, engine: Engine, policy: Policy, task: Task, seed: int) -> Trace:
        """One judged episode. `engine` is the manager's Episode, or any other."""
        policy = replace(policy, sampling=replace(policy.sampling, seed=seed))
        async with self.open(task, seed) as world:
            trace = await self.agent(engine, policy, world, self.limits)
            trace = trace.with_signals(**world.facts())
        return await self.judge.judge(task, trace, Bench(engine, seed))


def rewarding(name: str, version: str, open_world: Open, limits: Limits) -> Env:
    """An environment of another framework, which rewards by itself: a task is a seed, the fact `return` the reward."""
    judge = Judge(
        Reward("reward", lambda task, trace: trace.signals["return"]),
        metric("calls", lambda task, trace: float(sum(len(turn.results) for turn in trace.turns))),
    )
    return Env(name, version, lambda seed: {"seed": seed % 2**31}, open_world, judge, limits)


@dataclass(frozen=True, eq=False)
class Step:
    """observation: the messages that answer the action. reward: 0 until the end, then the judge's, or NaN where it had
    none. terminated: the agent answered; truncated: it had no turns left. info: at the end, `signals` and `reasons`."""

    observation: tuple[Message, ...]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any] = field(default_factory=dict[str, Any])


class Session:
    """One instance of an environment, stepped from outside: by a person, or by a program that brings its own model.

    Everything happens in the task that calls; sessions of one environment share nothing.
    """

    def __init__(self, env: Env, engine: Engine | None = None) -> None:
        """`engine` is for judges that ask a model."""
        self.env = env
        self._engine = engine
        self._stack = AsyncExitStack()
        self._world: World | None = None
        self.turns: list[Turn] = []
        self.trace: Trace | None = None

    @property
    def tools(self) -> list[ToolSpec]:
        """What can be called; known after `reset`."""
        return [tool.spec for tool in self._world.tools] if self._world else []

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """The opening messages. An episode under way is given up."""
        await self.close()
        self._world = await self._stack.enter_async_context(self.env.open(task, seed))
        self._toolbox = {tool.spec.name: tool for tool in self._world.tools}
        self._task, self._seed, self._begin = task, seed, time.monotonic()
        self._messages = list(self._world.opening)
        self.turns = []
        self.trace = None
        return tuple(self._messages)

    async def step(self, action: Message) -> Step:
        """`action` is an assistant's message: its calls are executed; without calls its text is the answer.

        Raises ValueError before `reset` and after the end."""
        if self._world is None or self.trace is not None:
            raise ValueError("there is no episode under way; call reset")
        number, started = len(self.turns), time.monotonic() - self._begin
        contexts = [
            CallContext(None, derive_seed(self._seed, number, index), self._begin)
            for index in range(len(action.tool_calls))
        ]
        results = await run_calls(action.tool_calls, contexts, self._toolbox)
        answers = tuple(
            tool_result(call.id, *result.shown) for call, result in zip(action.tool_calls, results, strict=True)
        )
        children = tuple(child for result in results for child in result.children)
        ended = time.monotonic() - self._begin
        self.turns.append(Turn(0, (), (), -1, action, answers, children, started, started, ended))
        self._messages += [action, *answers]
        if answers and len(self.turns) < self.env.limits.max_turns:
            return Step(answers, 0.0, False, False)
        self.trace = await self._judged("limit" if answers else "completed", action.text.strip())
        reward = self.env.judge.reward(self.trace.signals)
        info = {"signals": self.trace.signals, "reasons": self.trace.reasons}
        return Step(answers, float("nan") if reward is None else reward, not answers, bool(answers), info)

    async def close(self) -> None:
        """Gives back what the world holds; may be called again, and `reset` begins anew."""
        self._world = None
        await self._stack.aclose()

    async def _judged(self, status: Status, text: str) -> Trace:
        """A trace without tokens: whoever acted kept them, if there were any."""
        assert self._world
        turns = tuple(self.turns)
        trace = Trace("agent", tuple(self._messages), (), (), (), (), turns, status, text, trainable=False)
        trace = trace.with_signals(**self._world.facts())
        bench = Bench(self._engine, self._seed) if self._engine else None
        return await self.env.judge.judge(self._task, trace, bench)
