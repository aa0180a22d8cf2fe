"""Gymnasium environments as ours, and ours as Gymnasium environments. Needs the package gymnasium."""

import asyncio
import json
import math
import random
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces

from baltoro.agent.loop import Limits
from baltoro.agent.tool import CallContext, ToolResult
from baltoro.chat.messages import Clip, Image, Message, Part, ToolCall, ToolSpec, assistant
from baltoro.rollout.arguments import some_arguments
from baltoro.rollout.env import Env, Session, World, rewarding
from baltoro.rollout.judge import Task

# gymnasium's own types are incomplete.
_AnyEnv = Any


def from_gymnasium(make: Callable[[], _AnyEnv], name: str, version: str, prompt: str, limits: Limits) -> Env:
    """One tool, `act`, takes an action of the environment's space. What comes back is the picture where the environment
    renders rgb_array, or where its observation is one, and the observation as JSON otherwise. Reward: the return.

    Each episode has an instance and a thread of its own. Raises ValueError for an action space without JSON form, when
    an episode is opened."""

    @asynccontextmanager
    async def open_world(task: Task, seed: int) -> AsyncGenerator[World]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            inner = await loop.run_in_executor(thread, make)
            try:
                act = _Act(inner, thread)
                observation, _ = await loop.run_in_executor(thread, lambda: inner.reset(seed=task["seed"]))
                first = await loop.run_in_executor(thread, lambda: _parts(inner, observation))
                yield World((prompt, *first), [act], facts=lambda: {"return": act.total, "steps": act.steps})
            finally:
                await loop.run_in_executor(thread, inner.close)

    return rewarding(name, version, open_world, limits)


class _Act:
    sequential = True

    def __init__(self, env: _AnyEnv, thread: ThreadPoolExecutor) -> None:
        action = action_schema(env.action_space)
        self.spec = ToolSpec(
            "act", "Act.", {"type": "object", "properties": {"action": action}, "required": ["action"]}
        )
        self._env = env
        self._thread = thread
        self._over = False
        self.total = 0.0
        self.steps = 0.0

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        if self._over:
            return ToolResult(error="the episode is over; answer")
        space = self._env.action_space
        action = _from_json(space, arguments["action"])
        if not space.contains(action):
            return ToolResult(error=f"the action must lie in {space}")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._step, action)

    def _step(self, action: Any) -> ToolResult:
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self.total += float(reward)
        self.steps += 1
        self._over = bool(terminated or truncated)
        end = ("\nThe episode is over.",) if self._over else ()
        return ToolResult((*_parts(self._env, observation), f"reward {float(reward):g}", *end))


def action_schema(space: _AnyEnv) -> dict[str, object]:
    """The JSON schema of an action. Raises ValueError for spaces that have none."""
    if _is(space, spaces.Discrete):
        return {"type": "integer", "minimum": int(space.start), "maximum": int(space.start + space.n - 1)}
    if _is(space, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box):
        size = math.prod(space.shape)
        kind = "number" if np.issubdtype(space.dtype, np.floating) else "integer"
        return {"type": "array", "items": {"type": kind}, "minItems": size, "maxItems": size}
    if _is(space, spaces.Text):
        return {"type": "string", "maxLength": space.max_length}
    if _is(space, spaces.Dict):
        fields = {name: action_schema(below) for name, below in space.spaces.items()}
        return {"type": "object", "properties": fields, "required": [*fields]}
    raise ValueError(f"{space} has no JSON form; wrap the environment so that its actions have one")


def _is(value: object, *kinds: type) -> bool:
    """As isinstance, without what a type checker makes of gymnasium's half-typed classes."""
    return isinstance(value, kinds)


def _from_json(space: _AnyEnv, value: Any) -> Any:
    if _is(space, spaces.Dict):
        return {name: _from_json(below, value[name]) for name, below in space.spaces.items()}
    if _is(space, spaces.Text):
        return value
    if _is(space, spaces.Discrete):
        return np.int64(value)
    return np.asarray(value, dtype=space.dtype).reshape(space.shape)


def _parts(env: _AnyEnv, observation: Any) -> tuple[Part, ...]:
    seen: tuple[Any, ...] = (observation, env.render() if env.render_mode == "rgb_array" else None)
    for shown in seen:
        if _is(shown, np.ndarray) and shown.dtype == np.uint8 and shown.ndim == 3 and shown.shape[2] == 3:
            return (Image(np.ascontiguousarray(shown)),)
    return (json.dumps(observation, default=_plain),)


def _plain(value: Any) -> Any:
    return value.tolist() if _is(value, np.ndarray, np.generic) else str(value)


class _Observations(spaces.Space[Any]):
    """Tuples of text and pictures, as they stand in messages."""

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(isinstance(p, str | np.ndarray) for p in cast(tuple[Any, ...], x))


class _Actions(spaces.Space[Any]):
    """{"tool": name, "arguments": {...}} or {"answer": text}."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def contains(self, x: Any) -> bool:
        return isinstance(x, dict) and ("answer" in x or "tool" in x)

    def sample(self, mask: Any = None, probability: Any = None) -> Any:
        rng = random.Random(int(self.np_random.integers(2**31)))
        tools = self._session.tools
        if not tools or rng.random() < 0.2:
            return {"answer": "done"}
        tool = rng.choice(tools)
        return {"tool": tool.name, "arguments": some_arguments(tool.parameters, rng)}


class ToGymnasium(gymnasium.Env[Any, Any]):
    """An environment of ours for programs that know Gymnasium. Judges that ask a model have none here."""

    metadata = {"render_modes": []}  # noqa: RUF012  # as the base class has it

    def __init__(self, env: Env) -> None:
        self._env = env
        self._runner = asyncio.Runner()
        self._session = Session(env)
        self.observation_space = _Observations()
        self.action_space = _Actions(self._session)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """options: `task`, a row; otherwise the task of the seed."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31)) if seed is None else seed
        task = (options or {}).get("task") or self._env.sample(drawn)
        messages = self._runner.run(self._session.reset(task, drawn))
        tools = [
            {"name": t.name, "description": t.description, "parameters": t.parameters} for t in self._session.tools
        ]
        return _shown(messages), {"task": task, "tools": tools}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        step = self._runner.run(self._session.step(_message(action, len(self._session.turns))))
        return _shown(step.observation), step.reward, step.terminated, step.truncated, step.info

    def close(self) -> None:
        self._runner.run(self._session.close())
        self._runner.close()


def _message(action: dict[str, Any], turn: int) -> Message:
    if "answer" in action:
        return assistant(str(action["answer"]))
    arguments = json.dumps(action.get("arguments", {}))
    return assistant(tool_calls=(ToolCall(f"functions.{action['tool']}:{turn}", action["tool"], arguments),))


def _shown(messages: tuple[Message, ...]) -> tuple[Any, ...]:
    shown: list[Any] = []
    for part in (part for message in messages for part in message.content):
        match part:
            case str():
                shown.append(part)
            case Image():
                shown.append(part.pixels)
            case Clip():
                shown += list(part.frames)
            case _:
                shown.append("[a video file]")
    return tuple(shown)
