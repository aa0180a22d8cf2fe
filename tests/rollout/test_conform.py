"""Good environments pass; each broken promise is found by the check that is named after it."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.agent.loop import Limits
from baltoro.chat.messages import Image
from baltoro.chat.schema import parse_arguments
from baltoro.rollout.arguments import some_arguments
from baltoro.rollout.conform import conform, load_env
from baltoro.rollout.desktop import env as desktop
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Reward, Task, metric
from baltoro.rollout.toolset import Function, toolset


def environment(
    tool: Callable[[], object] = lambda: "fine",
    prompt: Callable[[], Any] = lambda: "go",
    sample: Callable[[int], Task] = lambda seed: {"n": seed},
    judge: Judge | None = None,
    functions: tuple[Function, ...] = (),
) -> Env:
    async def act(times: int = 1) -> object:
        """Act."""
        value = tool()
        return await value if asyncio.iscoroutine(value) else value

    @asynccontextmanager
    async def world(task: Task, seed: int) -> AsyncGenerator[World]:
        yield World((prompt(),), toolset(act, *functions, seconds=1e9))

    judge = judge or Judge(Reward("done", lambda task, trace: 1.0))
    return Env("test", "1", sample, world, judge, Limits(8, 999, 99))


def faults(env: Env) -> dict[str, tuple[str, ...]]:
    return {check.name: check.faults for check in asyncio.run(conform(env, step_s=0.3)) if check.faults}


@pytest.mark.parametrize("env", [environment(), desktop], ids=["small", "desktop"])
def test_good_environments_conform(env: Env) -> None:
    assert faults(env) == {}


counter = itertools.count()
kept: list[asyncio.Task[None]] = []
opened: list[object] = []


def leaves_a_task() -> str:
    kept.append(asyncio.get_running_loop().create_task(asyncio.sleep(3)))
    return "started"


def leaves_a_file() -> str:
    opened.append(open("/dev/null"))  # noqa: SIM115
    return "opened"


async def duplicate() -> None:
    """A second one."""


duplicate.__name__ = "act"


@pytest.mark.parametrize(
    ("check", "fault", "env"),
    [
        ("identity", "letters, digits", replace(environment(), name="my env")),
        ("identity", "the version is empty", replace(environment(), version="")),
        ("tasks", "another task each time", environment(sample=lambda seed: {"n": random.random()})),
        ("tasks", "does not come back from JSON", environment(sample=lambda seed: {"n": (1, 2)})),
        ("tasks", "cannot be written as JSON", environment(sample=lambda seed: {"n": {1, 2}})),
        ("observations", "is int; only text", environment(prompt=lambda: 5)),
        ("observations", "float64 pixels", environment(prompt=lambda: Image(np.zeros((2, 2, 3))))),  # pyright: ignore[reportArgumentType]
        ("tools", "two tools are called act", environment(functions=(duplicate,))),
        ("determinism", "turn 0 differs", environment(prompt=lambda: f"{next(counter)}")),
        ("determinism", "turn 1 differs", environment(tool=lambda: f"{next(counter)}")),
        ("rewards", "the judge gave nan", environment(judge=Judge(Reward("x", lambda t, _: float("nan"))))),
        ("rewards", "KeyError", environment(judge=Judge(Reward("x", lambda t, _: t["gold"])))),
        ("rewards", "no signal has a weight", environment(judge=Judge(metric("x", lambda t, _: 1.0)))),
        ("rewards", "when judged again", environment(judge=Judge(Reward("x", lambda t, _: next(counter))))),
        ("time", "act took more than 0.3 s", environment(tool=lambda: asyncio.sleep(1e9))),
        ("time", "held up the event loop", environment(tool=lambda: time.sleep(0.6))),
        ("cancellation", "a task is left running", environment(tool=leaves_a_task)),
        ("cancellation", "files or sockets are left open", environment(tool=leaves_a_file)),
    ],
)
def test_each_broken_promise_is_found(check: str, fault: str, env: Env) -> None:
    found = faults(env)
    for file in opened:
        file.close()  # pyright: ignore[reportAttributeAccessIssue]
    opened.clear()
    assert any(fault in each for each in found[check]), found


def test_instances_that_share_state_are_found() -> None:
    """A counter that starts anew with each world, in one place for all."""
    shared = {"n": 0}

    async def count() -> str:
        """Count."""
        shared["n"] += 1
        return f"{shared['n']}"

    @asynccontextmanager
    async def world(task: Task, seed: int) -> AsyncGenerator[World]:
        shared["n"] = 0
        yield World(("go",), toolset(count))

    found = faults(replace(environment(), open=world))
    assert list(found) == ["isolation"]
    assert "instances share state" in found["isolation"][0]


def test_a_world_that_cannot_be_opened_again_is_found() -> None:
    held: list[int] = []

    @asynccontextmanager
    async def world(task: Task, seed: int) -> AsyncGenerator[World]:
        if held:
            raise RuntimeError("the world is in use")
        held.append(1)
        yield World(("go",))  # an exception in the middle leaves it held
        held.clear()

    found = faults(replace(environment(), open=world))
    assert found["isolation"] == ("raised RuntimeError: the world is in use",)


def bounds(kind: str, numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda low, n: {"type": kind, "minimum": low, "maximum": low + n}, numbers, st.integers(1, 5))


def array(items: dict[str, Any], length: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length + 1}


def thing(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields][:1]}


schemas = st.recursive(
    st.one_of(
        st.just({"type": "string"}),
        st.just({"type": ["null", "boolean"]}),
        bounds("integer", st.integers(-9, 9)),
        bounds("number", st.floats(-9, 9)),
        st.builds(lambda values: {"enum": values}, st.lists(st.integers(), min_size=1, max_size=3)),
    ),
    lambda below: st.one_of(
        st.builds(array, below, st.integers(0, 2)),
        st.builds(lambda options: {"anyOf": options}, st.lists(below, min_size=1, max_size=3)),
        st.builds(thing, st.dictionaries(st.sampled_from("abc"), below, max_size=3)),
    ),
)


@given(st.dictionaries(st.sampled_from("xyz"), schemas, max_size=3), st.integers(0, 99))
def test_chance_arguments_satisfy_their_schema(fields: dict[str, Any], seed: int) -> None:
    schema: dict[str, object] = {"type": "object", "properties": fields, "required": [*fields][:2]}
    parse_arguments(json.dumps(some_arguments(schema, random.Random(seed))), schema)


def test_a_file_without_an_environment(tmp_path: Path) -> None:
    file = tmp_path / "empty.py"
    file.write_text("env = 5\n")
    with pytest.raises(ValueError, match=r"it must say: env = Env"):
        load_env(file)
    with pytest.raises(FileNotFoundError):
        load_env(tmp_path / "absent.py")
