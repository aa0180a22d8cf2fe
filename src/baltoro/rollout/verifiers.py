"""Task sets of the verifiers package (its v1 interface) as environments: rows, and the rewards and metrics that are
marked on a task. Tasks that need a container, and tools that the package serves itself, are not for this.

Nothing of the package is imported: whoever has a task set brings it.
"""

import inspect
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from baltoro.agent.loop import Limits
from baltoro.agent.trace import Trace
from baltoro.chat.messages import Message
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Bench, Judge, Task, Verdict


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
