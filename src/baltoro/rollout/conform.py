"""A test that any environment can be put to: whether it keeps what the interface promises (`baltoro env check`)."""

import asyncio
import importlib.util
import json
import math
import os
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baltoro.agent.trace import media_hash
from baltoro.chat.declare import declare_tools
from baltoro.chat.messages import Clip, Image, Message, Part, ToolCall, ToolSpec, Video, assistant
from baltoro.chat.schema import check_schema
from baltoro.rollout.arguments import some_arguments
from baltoro.rollout.env import Env, Session, Step
from baltoro.rollout.judge import Task

_SEEDS = (0, 1, 2)
_TURNS = 4
_LAG_S = 0.5


@dataclass(frozen=True)
class Check:
    """faults: empty where the environment passed."""

    name: str
    faults: tuple[str, ...]


def load_env(file: Path) -> Env:
    """The `env` of a Python file, which is run. Raises ValueError, OSError, and whatever the file raises."""
    if not file.exists():
        raise FileNotFoundError(2, "No such file or directory", str(file))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file; name it something.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    env = getattr(module, "env", None)
    if not isinstance(env, Env):
        raise ValueError(f"{file} has no environment; it must say: env = Env(...)")
    return env


async def conform(env: Env, begun: Callable[[str], None] = lambda name: None, step_s: float = 10.0) -> list[Check]:
    """Every promise, in order. `begun` hears of each check before it is made. A step may take `step_s` seconds."""
    player = _Player(env, step_s)
    checks: dict[str, Callable[[], AsyncGenerator[str]]] = {
        "identity": lambda: _identity(env),
        "tasks": lambda: _tasks(env),
        "observations": lambda: _observations(player),
        "tools": lambda: _tools(player),
        "determinism": lambda: _determinism(player),
        "isolation": lambda: _isolation(player),
        "reset after close": lambda: _reset(player),
        "rewards": lambda: _rewards(player),
        "time": lambda: _time(player),
        "cancellation": lambda: _cancellation(player),
    }
    done: list[Check] = []
    for name, check in checks.items():
        begun(name)
        faults: list[str] = []
        try:
            async for fault in check():
                faults.append(fault)
        except Exception as error:  # the boundary for environments that raise
            faults.append(f"raised {type(error).__name__}: {error}")
        done.append(Check(name, tuple(dict.fromkeys(faults))))
    return done


@dataclass(frozen=True)
class _Player:
    """Plays by chance: what it does follows from its seed and the tools alone."""

    env: Env
    step_s: float

    def task(self, seed: int) -> Task:
        """As a record gives it back."""
        return json.loads(json.dumps(self.env.sample(seed)))

    def actions(self, tools: list[ToolSpec], seed: int) -> Iterator[Message]:
        rng = random.Random(seed)
        for turn in range(min(_TURNS, self.env.limits.max_turns) - 1 if tools else 0):
            tool = rng.choice(tools)
            arguments = json.dumps(some_arguments(tool.parameters, rng))
            yield assistant(tool_calls=(ToolCall(f"functions.{tool.name}:{turn}", tool.name, arguments),))
        yield assistant("done")

    async def step(self, session: Session, action: Message) -> Step:
        try:
            async with asyncio.timeout(self.step_s):
                return await session.step(action)
        except TimeoutError:
            names = ", ".join(call.name for call in action.tool_calls) or "the judge"
            raise ValueError(f"{names} took more than {self.step_s:g} s; bound it, as toolset(seconds=) does") from None

    async def play(self, session: Session, seed: int) -> list[Any]:
        """Everything observed, and the signals, in a form that can be compared."""
        seen: list[Any] = [_plain(await session.reset(self.task(seed), seed))]
        for action in self.actions(session.tools, seed):
            step = await self.step(session, action)
            seen.append(_seen(step))
        await session.close()
        return seen

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Session]:
        session = Session(self.env)
        try:
            yield session
        finally:
            await session.close()


async def _identity(env: Env) -> AsyncGenerator[str]:
    if not re.fullmatch(r"[\w.-]+", env.name):
        yield f"the name {env.name!r} must be letters, digits, '.', '_' or '-'"
    if not env.version:
        yield "the version is empty"


async def _tasks(env: Env) -> AsyncGenerator[str]:
    for seed in _SEEDS:
        task = env.sample(seed)
        if task != env.sample(seed):
            yield f"sample({seed}) gives another task each time; draw from random.Random(seed)"
        try:
            if json.loads(json.dumps(task, allow_nan=False)) != task:
                yield f"sample({seed}) does not come back from JSON as it was; use lists, not tuples, and text as keys"
        except (TypeError, ValueError) as error:
            yield f"sample({seed}) cannot be written as JSON: {error}"


async def _observations(player: _Player) -> AsyncGenerator[str]:
    async with player.session() as session:
        messages = list(await session.reset(player.task(0), 0))
        if not messages[-1].content:
            yield "the prompt is empty"
        for action in player.actions(session.tools, 0):
            messages += (await player.step(session, action)).observation
        for message in messages:
            for part in message.content:
                if fault := _part_fault(part):
                    yield f"a part of a {message.role} message {fault}"


def _part_fault(part: object) -> str:
    if not isinstance(part, str | Image | Clip | Video):
        return f"is {type(part).__name__}; only text, Image, Clip and Video can be shown"
    if isinstance(part, str | Video):
        return ""
    array, dims = (part.pixels, 3) if isinstance(part, Image) else (part.frames, 4)
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or not array.size:
        return f"has {array.dtype} pixels of shape {array.shape}; give uint8 RGB"
    return ""


async def _tools(player: _Player) -> AsyncGenerator[str]:
    async with player.session() as session:
        await session.reset(player.task(0), 0)
        names = [tool.name for tool in session.tools]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"two tools are called {name}"
        for tool in session.tools:
            if not re.fullmatch(r"[\w.-]+", tool.name):
                yield f"the tool name {tool.name!r} must be letters, digits, '.', '_' or '-'"
            if not tool.description:
                yield f"the tool {tool.name} has no description"
            try:
                check_schema(tool.parameters)
                declare_tools([tool])
            except ValueError as error:
                yield f"the tool {tool.name}: {error}"


async def _determinism(player: _Player) -> AsyncGenerator[str]:
    for seed in _SEEDS:
        async with player.session() as first, player.session() as second:
            if fault := _difference(await player.play(first, seed), await player.play(second, seed)):
                yield f"seed {seed}, the same actions twice: {fault}"


async def _isolation(player: _Player) -> AsyncGenerator[str]:
    """Two instances in turns, each as it would be alone."""
    alone: list[list[Any]] = []
    for seed in _SEEDS[:2]:
        async with player.session() as session:
            alone.append(await player.play(session, seed))
    async with player.session() as first, player.session() as second:
        sessions = (first, second)
        seen: list[list[Any]] = [[_plain(await s.reset(player.task(seed), seed))] for seed, s in enumerate(sessions)]
        actions = [player.actions(session.tools, seed) for seed, session in enumerate(sessions)]
        left = [0, 1]
        while left:
            for index in tuple(left):
                if (action := next(actions[index], None)) is None:
                    left.remove(index)
                    continue
                step = await player.step(sessions[index], action)
                seen[index].append(
                    (_plain(step.observation), step.terminated, step.truncated, step.info.get("signals"))
                )
        for index, (apart, together) in enumerate(zip(alone, seen, strict=True)):
            if fault := _difference(apart, together):
                yield f"seed {index}, beside another instance: {fault}; instances share state"


async def _reset(player: _Player) -> AsyncGenerator[str]:
    """The same session again, after its end and in the middle of an episode."""
    async with player.session() as session:
        first = await player.play(session, 0)
        if fault := _difference(first, await player.play(session, 0)):
            yield f"after close: {fault}"
        await session.reset(player.task(1), 1)
        await player.step(session, next(player.actions(session.tools, 1)))
        if fault := _difference(first, await player.play(session, 0)):
            yield f"in the middle of an episode: {fault}"


async def _rewards(player: _Player) -> AsyncGenerator[str]:
    env = player.env
    names = [name for examiner in env.judge.examiners for name in examiner.weights]
    if any(not name for name in names):
        yield "a reward has no name"
    if not env.judge.weights:
        yield "no signal has a weight, so every reward is 0"
    for seed in _SEEDS:
        async with player.session() as session:
            *_, (_, _, _, signals) = await player.play(session, seed)
            trace = session.trace
            assert trace
            for name, value in signals.items():
                if not math.isfinite(value):
                    yield f"the signal {name} is {value}"
            for name in names:
                reason = trace.reasons.get(name, "")
                if name not in signals and not reason.endswith("no model to ask"):
                    yield f"there is no signal {name}: {reason or 'the judge said nothing'}"
            task = player.task(seed)
            for name, value in env.judge.again(task, trace).items():
                if value != signals.get(name):
                    yield f"the signal {name} is {signals.get(name)}, and {value} when judged again"


async def _time(player: _Player) -> AsyncGenerator[str]:
    """No step hangs, and none holds up what else runs."""
    loop = asyncio.get_running_loop()
    lag, slow = 0.0, ""

    async def beat() -> None:
        nonlocal lag
        while True:
            before = loop.time()
            await asyncio.sleep(0.01)
            lag = max(lag, loop.time() - before - 0.01)

    async with asyncio.TaskGroup() as group:
        heart = group.create_task(beat())
        await asyncio.sleep(0)  # the first beat begins
        try:
            async with player.session() as session:
                await player.play(session, 0)
        except Exception as error:
            slow = str(error)
        await asyncio.sleep(0.02)  # one more beat, to see what the last step did
        heart.cancel()
    if slow:
        yield slow
    if lag > _LAG_S:
        yield f"something held up the event loop for {lag:.1f} s; move slow work into asyncio.to_thread or a process"


async def _cancellation(player: _Player) -> AsyncGenerator[str]:
    """A step that is cancelled leaves no task, no process and no open file behind."""
    async with player.session() as warm:  # what is opened once for all is no leak
        await player.play(warm, 0)
    tasks, files, processes = asyncio.all_tasks(), _open_files(), _processes()
    for seed in _SEEDS:
        async with player.session() as session:
            await session.reset(player.task(seed), seed)
            action = next(player.actions(session.tools, seed))
            async with asyncio.TaskGroup() as group:
                step = group.create_task(_ignored(session.step(action)))
                await asyncio.sleep(0.005 * seed)
                step.cancel()
    for _ in range(50):  # what was cancelled may take a moment to go
        if asyncio.all_tasks() <= tasks and _open_files() <= files and _processes() <= processes:
            return
        await asyncio.sleep(0.02)
    for task in asyncio.all_tasks() - tasks:
        yield f"a task is left running: {task.get_coro()}"
    if (extra := _open_files() - files) > 0:
        yield f"{extra} files or sockets are left open"
    if more := _processes() - processes:
        yield f"{len(more)} processes are left running"


async def _ignored(step: Awaitable[Step]) -> None:
    await step


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def _processes() -> set[str]:
    found: set[str] = set()
    for children in Path("/proc/self/task").glob("*/children"):
        found |= set(children.read_text().split())
    return found


def _seen(step: Step) -> Any:
    return _plain(step.observation), step.terminated, step.truncated, step.info.get("signals")


def _plain(messages: tuple[Message, ...]) -> list[Any]:
    return [(m.role, m.tool_call_id, [_plain_part(part) for part in m.content]) for m in messages]


def _plain_part(part: Part) -> object:
    if isinstance(part, Image | Clip):
        return f"<{type(part).__name__} {media_hash(part)}>"
    return part.file if isinstance(part, Video) else part


def _difference(first: list[Any], second: list[Any]) -> str:
    for turn, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return f"turn {turn} differs: {_short(one)} against {_short(other)}"
    return "" if len(first) == len(second) else f"{len(first)} turns against {len(second)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
