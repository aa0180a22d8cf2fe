"""A task set as verifiers 0.4 has it: pydantic rows, methods that its decorators mark by attributes, tool servers."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from baltoro.agent.loop import Limits
from baltoro.chat.messages import Clip, Image, assistant
from baltoro.rollout.conform import conform
from baltoro.rollout.env import Env, Session, World
from baltoro.rollout.judge import Judge, Reward, Verdict, metric
from baltoro.rollout.pictures import PREFIX, data_uri, from_data_uri
from baltoro.rollout.toolset import toolset
from baltoro.rollout.verifiers import from_verifiers, to_verifiers

LIMITS = Limits(3, 999, 99)


class Data(BaseModel):
    model_config = ConfigDict(frozen=True)
    idx: int | None = None
    prompt: str | list[Any] | None = None
    system_prompt: str | None = None
    answer: str = ""


def marked(kind: str, weight: float = 1.0) -> Any:
    def mark(function: Any) -> Any:
        setattr(function, kind, True)
        if kind == "reward":
            function._vf_weight = weight
        return function

    return mark


class Capital:
    def __init__(self, data: Data, config: str) -> None:
        self.data, self.config = data, config

    @marked("reward", 2.0)
    async def right(self, trace: Any) -> float:
        return float(trace.last_reply == self.data.answer)

    @marked("reward", 0.5)
    def short(self, task: Data, trace: Any) -> float:
        return float(len(trace.assistant_messages[-1].content) <= len(task.answer))

    @marked("metric")
    async def turns(self, trace: Any) -> int:
        return len(trace.messages)


TASKS = [
    Capital(Data(idx=i, prompt=f"capital of {land}?", system_prompt="Be brief.", answer=city), "config")
    for i, (land, city) in enumerate((("Zorblax", "Mirn"), ("Ulm", "Vek")))
]


def test_rows_rewards_and_metrics() -> None:
    env = from_verifiers(iter(TASKS), "capitals", "1", LIMITS)
    assert env.judge.weights == {"right": 2.0, "short": 0.5}
    assert [env.sample(seed)["answer"] for seed in range(3)] == ["Mirn", "Vek", "Mirn"]

    async def answer(text: str) -> tuple[float, dict[str, float]]:
        session = Session(env)
        system, user = await session.reset(env.sample(1), 1)
        assert (system.text, user.text) == ("Be brief.", "capital of Ulm?")
        step = await session.step(assistant(text))
        await session.close()
        return step.reward, step.info["signals"]

    assert asyncio.run(answer("Vek")) == (2.5, {"right": 1.0, "short": 1.0, "turns": 3.0})
    assert asyncio.run(answer("Mirn")) == (0.0, {"right": 0.0, "short": 0.0, "turns": 3.0})
    assert [check for check in asyncio.run(conform(env)) if check.faults] == []


def test_what_cannot_be_taken_over_is_told() -> None:
    class Boxed(Capital):
        NEEDS_CONTAINER = True

    for tasks, fault in (
        ([], "has no tasks"),
        ([Boxed(TASKS[0].data, "")], "need a container"),
        ([Capital(Data(), "")], "no prompt of text"),
    ):
        with pytest.raises(ValueError, match=fault):
            from_verifiers(tasks, "x", "1", LIMITS)


class Base:
    """What generic classes of the package are to those who subclass them."""

    def __class_getitem__(cls, item: object) -> type:
        return cls

    def __init__(self, *given: Any) -> None:
        self.__dict__.update(zip(("data", "config"), given, strict=False))


class Server(Base):
    """A tool server, whose state goes to the rollout after each call."""

    def __init__(self, config: object) -> None:
        self._exit_stack, self.sent, self.state = AsyncExitStack(), [], State()

    def _with_state(self, call: Any) -> Any:
        async def called(*given: Any) -> Any:
            self.state = State()
            try:
                return await call(*given)
            finally:
                self.sent.append(self.state.facts)

        return called


class State(BaseModel):
    facts: dict[str, float] = {}


class Tasks(Base):
    def __init__(self) -> None:
        self.config = SimpleNamespace(task="config")


PACKAGE = SimpleNamespace(
    State=State, TaskData=Data, Task=Base, Taskset=Tasks, TasksetConfig=object, Toolset=Server, ToolsetConfig=object,
    reward=lambda weight: marked("reward", weight), metric=marked("metric"),
)  # fmt: skip


@asynccontextmanager
async def counter(task: dict[str, Any], seed: int) -> AsyncGenerator[World]:
    """Counts up; gives the hand a moment between its count and its answer."""
    total = 0

    async def add(number: int) -> tuple[str, Image]:
        """Add."""
        nonlocal total
        if number < 0:
            raise ValueError("only upwards")
        total += number
        await asyncio.sleep(0.01 / number)
        return f"{total}", Image(np.full((1, 2, 3), 9, np.uint8))

    yield World(("to ", f"{task['goal']}", *task["shown"]), toolset(add), "Count.", lambda: {"total": float(total)})


def sample(seed: int) -> dict[str, Any]:
    return {"goal": seed + 5, "shown": ["!"]}


COUNTING = Env(
    "counting", "1", sample, counter,
    Judge(
        Reward("reached", lambda task, trace: float(trace.signals["total"] == task["goal"]), 2.0),
        Reward("said", lambda task, trace: float(trace.final_text == f"{task['goal']}"), 0.5),
        metric("calls", lambda task, trace: float(sum(len(turn.results) for turn in trace.turns))),
        metric("cut", lambda task, trace: float(trace.status == "limit")),
        metric("red", lambda task, trace: float(trace.messages[3].content[1].pixels[0, 0, 0])),  # type: ignore[union-attr]
    ),
    LIMITS,
)  # fmt: skip


def said(role: str, content: object, *calls: tuple[str, str, str], of: str = "") -> Any:
    made = [SimpleNamespace(id=id, name=name, arguments=arguments) for id, name, arguments in calls]
    return SimpleNamespace(role=role, content=content, reasoning_content=None, tool_calls=made, tool_call_id=of)


async def test_outwards_rows_rewards_and_metrics() -> None:
    _, _, tasks = to_verifiers(COUNTING, PACKAGE, "my_module", 2)
    first, second = tasks().load()
    assert (first.data.prompt, first.data.system_prompt, second.data.prompt) == ("to 5!", "Count.", "to 6!")
    assert (second.data.idx, second.data.row["goal"], second.data.facts) == (1, 6, {"total": 0.0})
    assert [type(tool).__name__ for tool in first.toolsets("config")] == ["Tools"]
    picture = SimpleNamespace(
        type="image_url", image_url=SimpleNamespace(url=data_uri(np.full((1, 1, 3), 9, np.uint8)))
    )
    messages = [
        said("system", "Count."),
        said("user", "to 6!"),
        said("assistant", None, ("c", "add", "{}"), ("d", "add", "{}")),
        said("tool", [SimpleNamespace(type="text", text="6"), picture], of="c"),
        said("tool", "error", of="d"),
        said("assistant", "6"),
    ]

    async def score(facts: dict[str, float], truncated: bool, reply: str) -> dict[str, float]:
        trace = SimpleNamespace(
            messages=messages, is_truncated=truncated, last_reply=reply, state=SimpleNamespace(facts=facts)
        )
        named = {name: getattr(second, name) for name in ("reached", "said", "calls", "cut", "red")}
        return {name: await method(trace) for name, method in named.items()}

    full = {"reached": 1.0, "said": 1.0, "calls": 2.0, "cut": 0.0, "red": 9.0}
    assert await score({"total": 6.0}, False, "6") == full
    assert await score({}, True, "7") == full | {"reached": 0.0, "said": 0.0, "cut": 1.0}
    weights = {name: getattr(getattr(second, name), "_vf_weight", None) for name in full}
    assert weights == {"reached": 2.0, "said": 0.5, "calls": None, "cut": None, "red": None}


async def test_outwards_a_signal_that_cannot_be_had_is_an_error() -> None:
    class Silent:
        weights = {"asked": 1.0}  # noqa: RUF012

        async def examine(self, task: Any, trace: Any, bench: Any) -> dict[str, Verdict]:
            return {"asked": Verdict(None, f"no model: {bench}")}

    _, _, tasks = to_verifiers(dataclasses.replace(COUNTING, judge=Judge(Silent())), PACKAGE, "my_module", 1)
    (task,) = tasks().load()
    trace = SimpleNamespace(messages=[], is_truncated=False, last_reply="", state=State())
    with pytest.raises(ValueError, match="no model: None"):
        await task.asked(trace)


async def test_outwards_tools() -> None:
    row, tools, tasks = to_verifiers(COUNTING, PACKAGE, "my_module", 1)
    assert [(kind.__module__, kind.__qualname__) for kind in (row, tools, tasks)] == [
        ("my_module", "Row"), ("my_module", "Tools"), ("my_module", "Tasks"),
    ]  # fmt: skip
    server, mcp = tools("config"), SimpleNamespace()
    (task,) = tasks().load()
    await server.setup_task(task.data)
    server.register(mcp)
    (listed,) = await mcp.list_tools()
    assert (listed.name, listed.description) == ("add", "Add.")
    assert listed.input_schema["properties"] == {"number": {"type": "integer"}}
    slow, quick = await asyncio.gather(mcp.call_tool("add", {"number": 1}), mcp.call_tool("add", {"number": 4}))
    assert (slow.content[0].text, quick.content[0].text) == ("1", "5")
    assert from_data_uri(PREFIX + quick.content[1].data).pixels.tolist() == [[[9] * 3] * 2]
    refused = await mcp.call_tool("add", {"number": -1})
    assert (refused.is_error, refused.content[0].text, slow.is_error) == (True, "error: only upwards", False)
    assert server.sent == [{"total": 1.0}, {"total": 5.0}, {"total": 5.0}]


def test_what_cannot_be_given_is_told() -> None:
    async def together(*given: Any) -> Any: ...

    with pytest.raises(ValueError, match="agents of its own"):
        to_verifiers(dataclasses.replace(COUNTING, agent=together), PACKAGE, "my_module", 1)
    picture, clip = Image(np.full((1, 1, 3), 9, np.uint8)), Clip(np.zeros((1, 2, 2, 3), np.uint8), 1.0)
    shown = [[picture], [clip]]
    env = dataclasses.replace(COUNTING, sample=lambda seed: {"goal": 1, "shown": shown[seed]})
    _, _, tasks = to_verifiers(env, PACKAGE, "my_module", 2)
    rows = tasks().load()
    (message,) = next(rows).data.prompt
    assert [part["type"] for part in message["content"]] == ["text", "text", "image_url"]
    with pytest.raises(ValueError, match="a clip cannot be shown"):
        next(rows)
