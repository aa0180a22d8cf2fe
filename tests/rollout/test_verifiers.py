"""A task set as verifiers 0.4 has it: pydantic rows, and methods that its decorators mark by attributes."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from baltoro.agent.loop import Limits
from baltoro.chat.messages import assistant
from baltoro.rollout.conform import conform
from baltoro.rollout.env import Session
from baltoro.rollout.verifiers import from_verifiers

LIMITS = Limits(3, 999, 99)


class Data(BaseModel):
    model_config = ConfigDict(frozen=True)
    idx: int | None = None
    prompt: str | None = None
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
