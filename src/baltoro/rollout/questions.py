"""Questions on pictures and clips of the built-in world, answered in one turn."""

import json
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from baltoro.agent.loop import Limits
from baltoro.agent.trace import Trace
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Reward, Task
from baltoro.world.scenes import Split
from baltoro.world.vision import VISION_TASKS, VisionExample

ANSWER_TOKENS = 24


def questions(split: Split) -> Env:
    """Signal `perf`: the family's own measure."""

    def draw(seed: int) -> VisionExample:
        rng = random.Random(seed)
        return rng.choice(list(VISION_TASKS.values())).sample(rng, split)

    def sample(seed: int) -> Task:
        example = draw(seed)
        row = {"family": example.task, "seed": seed, "question": example.question, "gold": example.gold}
        return json.loads(json.dumps(row))

    @asynccontextmanager
    async def show(task: Task, seed: int) -> AsyncGenerator[World]:
        example = draw(task["seed"])
        yield World((example.media, example.question))

    return Env("questions", "1", sample, show, Judge(Reward("perf", _perf)), Limits(1, 512, ANSWER_TOKENS))


def _perf(task: Task, trace: Trace) -> float:
    return VISION_TASKS[task["family"]].score(trace.final_text, task["gold"])


env = questions("train")
