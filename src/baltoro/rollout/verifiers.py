"""Task sets of the verifiers package (its v1 interface) as environments, and environments as its task sets.

Inwards cross rows, and the rewards and metrics that are marked on a task; not tasks that need a container, nor tools
that the package serves itself. What crosses outwards is told at `to_verifiers`.

Nothing of the package is imported: whoever has a task set brings it.
"""

import asyncio
import inspect
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from pydantic import Field

from baltoro.agent.loop import Limits, derive_seed, run_calls
from baltoro.agent.tool import CallContext
from baltoro.agent.trace import Trace, Turn
from baltoro.chat.messages import Image, Message, Part, ToolCall
from baltoro.rollout.env import Env, World, alone
from baltoro.rollout.judge import Bench, Examiner, Judge, Task, Verdict
from baltoro.rollout.pictures import PREFIX, data_uri, from_data_uri


def from_verifiers(taskset: Iterable[Any], name: str, version: str, limits: Limits, most: int = 100_000) -> Env:
    """`most`: tasks that are read, of a set without end. The seed chooses among them.

    Raises ValueError for a set without tasks, and for tasks whose prompt is not text or that need a container."""
    tasks = list(islice(taskset, most))
    if not tasks:
        raise ValueError(f"the task set {name} has no tasks")
    rows: list[Task] = [task.data.model_dump(mode="json", exclude_none=True) for task in tasks]
    for row in rows:
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"a task of {name} has no prompt of text alone; write an environment for it")
    if any(getattr(task, "NEEDS_CONTAINER", False) for task in tasks):
        raise ValueError(f"tasks of {name} need a container; run them with the package itself")
    first = tasks[0]

    def task_of(row: Task) -> Any:
        return type(first)(type(first.data)(**row), first.config)

    @asynccontextmanager
    async def open_world(task: Task, seed: int) -> AsyncGenerator[World]:
        yield World((task["prompt"],), system=task.get("system_prompt", ""))

    judge = Judge(*(_Marked(method, task_of) for method in _marked(first)))
    return Env(name, version, lambda seed: rows[seed % len(rows)], open_world, judge, limits)


def _marked(task: Any) -> list[Callable[..., Any]]:
    methods: list[Any] = [getattr(task, name) for name in dir(task.__class__) if not name.startswith("__")]
    return [m for m in methods if callable(m) and (hasattr(m, "reward") or hasattr(m, "metric"))]


class _Marked:
    """One reward or metric."""

    def __init__(self, method: Callable[..., Any], task_of: Callable[[Task], Any]) -> None:
        self._name = method.__name__
        self._weight = float(getattr(method, "_vf_weight", 1.0)) if hasattr(method, "reward") else 0.0
        self._task_of = task_of

    @property
    def weights(self) -> Mapping[str, float]:
        return {self._name: self._weight}

    async def examine(self, task: Task, trace: Trace, bench: Bench | None) -> Mapping[str, Verdict]:
        theirs = self._task_of(task)
        method = getattr(theirs, self._name)
        given = {"task": theirs.data, "trace": Seen.of(trace)}
        wanted = inspect.signature(method).parameters
        value = method(**{name: given[name] for name in wanted if name in given})
        if inspect.isawaitable(value):
            value = await value
        if isinstance(value, Mapping):
            raise ValueError("several scores from one method; give each a method of its own")
        return {self._name: Verdict(float(value))}


@dataclass(frozen=True)
class Said:
    """A message, with the attributes that the package gives it."""

    role: str
    content: str
    reasoning_content: str
    tool_calls: tuple[Any, ...]

    @classmethod
    def of(cls, message: Message) -> "Said":
        return cls(message.role, message.text, message.reasoning, message.tool_calls)


@dataclass(frozen=True)
class Seen:
    """Of the package's trace what rewards read."""

    messages: list[Said]
    last_reply: str

    @classmethod
    def of(cls, trace: Trace) -> "Seen":
        return cls([Said.of(message) for message in trace.messages], trace.final_text)

    @property
    def assistant_messages(self) -> list[Said]:
        return [message for message in self.messages if message.role == "assistant"]


def to_verifiers(env: Env, package: Any, module: str, tasks: int) -> tuple[type, type, type]:
    """`env` for the package's own runs: the classes of its rows, of its tool server and of its task set of the seeds
    0 to `tasks` - 1. package: `verifiers.v1`. module: the `__name__` of the file that calls this and binds the three
    under their names, because the package finds them by it, and starts it as the tool server:

        Row, Tools, Tasks = to_verifiers(env, verifiers.v1, __name__, 1000)
        __all__ = ["Tasks"]
        if __name__ == "__main__":
            Tools.run()

    Prompts, pictures, tools and facts cross, and the judge as one reward or metric per signal. Tools are served over
    MCP by a process per rollout, to a harness that speaks it; it opens the world anew, which is why worlds must be the
    same under the same seed. What does not cross: the limits (they are the run's), critical steps, and judges that ask
    a model, which have none: scoring then fails, as it does wherever a signal is missing.

    Raises ValueError for environments whose agents work in a way of their own, and in `load` for clips and videos."""
    if env.agent is not alone:
        raise ValueError(f"{env.name} has agents of its own, which no harness of verifiers can be")

    def opened(seed: int) -> tuple[World, dict[str, float]]:
        async def look() -> tuple[World, dict[str, float]]:
            async with env.open(env.sample(seed), seed) as world:
                return world, dict(world.facts())

        with ThreadPoolExecutor(1) as thread:  # the package loads tasks within its running loop
            return thread.submit(asyncio.run, look()).result()

    @cache
    def has_tools() -> bool:
        return bool(opened(0)[0].tools)

    class Facts(package.State):
        facts: dict[str, float] = Field(default_factory=dict[str, float])

    class Row(package.TaskData):
        __module__, __qualname__ = module, "Row"
        row: Task
        seed: int
        facts: dict[str, float]

    class Scored(package.Task[Row, Facts]):
        __module__, __qualname__ = module, env.name

        @classmethod
        def toolsets(cls, config: Any) -> list[Any]:
            return [Tools(package.ToolsetConfig())] if has_tools() else []

    for examiner in env.judge.examiners:
        for name, weight in examiner.weights.items():
            mark = package.reward(weight=weight) if weight else package.metric
            setattr(Scored, name, mark(_score(examiner, name)))

    class Tasks(package.Taskset[Scored, package.TasksetConfig]):
        __module__, __qualname__ = module, "Tasks"

        def load(self) -> Iterator[Any]:
            for seed in range(tasks):
                world, facts = opened(seed)
                texts = [part for part in world.prompt if isinstance(part, str)]
                given = [{"role": "user", "content": [_part(part) for part in world.prompt]}]
                prompt = "".join(texts) if len(texts) == len(world.prompt) else given
                row = Row(
                    idx=seed,
                    prompt=prompt,
                    system_prompt=world.system or None,
                    row=env.sample(seed),
                    seed=seed,
                    facts=facts,
                )
                yield Scored(row, self.config.task)

    class Tools(package.Toolset[package.ToolsetConfig, Facts]):
        __module__, __qualname__ = module, "Tools"
        TOOL_PREFIX = None

        async def setup_task(self, task: Any) -> None:
            self._seed, self._calls, self._begin = task.seed, 0, time.monotonic()
            self._world = await self._exit_stack.enter_async_context(env.open(task.row, task.seed))

        def register(self, mcp: Any) -> None:
            one_at_a_time, call = asyncio.Lock(), self._with_state(self.call_tool)

            async def in_turn(*given: Any) -> Any:
                async with one_at_a_time:  # or facts of an earlier call could arrive last
                    return await call(*given)

            mcp.list_tools, mcp.call_tool = self.list_tools, in_turn

        async def list_tools(self) -> list[Any]:
            from mcp.types import Tool

            specs = [tool.spec for tool in self._world.tools]
            return [Tool(name=s.name, description=s.description, input_schema=s.parameters) for s in specs]

        async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
            from mcp.types import CallToolResult, ImageContent, TextContent

            calling = CallContext(None, derive_seed(self._seed, self._calls), self._begin)
            call = ToolCall(f"functions.{name}:{self._calls}", name, json.dumps(arguments))
            self._calls += 1
            (result,) = await run_calls([call], [calling], {tool.spec.name: tool for tool in self._world.tools})
            self.state.facts = dict(self._world.facts())
            shown: list[Any] = [
                TextContent(text=part)
                if isinstance(part, str)
                else ImageContent(data=_uri(part).removeprefix(PREFIX), mime_type="image/png")
                for part in result.shown
            ]
            return CallToolResult(content=shown, is_error=not result.content and bool(result.error))

    return Row, Tools, Tasks


def _score(examiner: Examiner, name: str) -> Callable[..., Any]:
    async def score(self: Any, trace: Any) -> float:
        judged = (await examiner.examine(self.data.row, _trace(trace, self.data.facts), None))[name]
        if judged.value is None:
            raise ValueError(judged.reason)
        return judged.value

    score.__name__ = name
    return score


def _trace(theirs: Any, facts: dict[str, float]) -> Trace:
    """Without tokens: the package has them."""
    messages = [_message(message) for message in theirs.messages]
    turns: list[Turn] = []
    for message in messages:
        if message.role == "assistant":
            turns.append(Turn(0, (), (), -1, message, (), (), 0.0, 0.0, 0.0))
        elif message.role == "tool":
            turns[-1] = replace(turns[-1], results=(*turns[-1].results, message))
    status = "limit" if theirs.is_truncated else "completed"
    signals = {**facts, **theirs.state.facts}
    text = theirs.last_reply
    return Trace("agent", tuple(messages), (), (), (), (), tuple(turns), status, text, False, signals=signals)


def _message(theirs: Any) -> Message:
    calls = [ToolCall(call.id, call.name, call.arguments) for call in getattr(theirs, "tool_calls", None) or ()]
    parts = [theirs.content] if isinstance(theirs.content, str) else theirs.content or ()
    return Message(
        theirs.role,
        tuple(part if isinstance(part, str) else _seen(part) for part in parts),
        getattr(theirs, "reasoning_content", None) or "",
        tuple(calls),
        getattr(theirs, "tool_call_id", ""),
    )


def _seen(theirs: Any) -> Part:
    return theirs.text if theirs.type == "text" else from_data_uri(theirs.image_url.url)


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": _uri(part)}}


def _uri(part: Part) -> str:
    if not isinstance(part, Image):
        raise ValueError(f"a {type(part).__name__.lower()} cannot be shown through verifiers; show pictures")
    return data_uri(part.pixels)
