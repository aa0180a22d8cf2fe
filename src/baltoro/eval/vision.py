"""Held-out visual questions, answered in one turn; every score stands beside its chance level."""

import asyncio
import random
from dataclasses import dataclass

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.loop import Limits, run_agent
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Image, system, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.swarm.demonstrations import PYTHON_PROMPT
from baltoro.tools.python import Python, Sandbox
from baltoro.world.vision import VISION_TASKS, VisionExample, chance

ANSWER_TOKENS = 24
CODE_TOKENS = 192


@dataclass(frozen=True, eq=False)
class Answered:
    example: VisionExample
    text: str
    score: float


@dataclass(frozen=True, eq=False)
class VisionResult:
    """accuracy: mean score by the task's own measure (exact for words, soft for boxes, points, outlines, lettering and
    counts); chance: the same measure for the best blind strategy on the same examples."""

    accuracy: float
    chance: float
    n: int
    answered: list[Answered]


async def evaluate_boxes_by_code(
    engine: Engine, tokenizer: Tokenizer, media: MediaSpec, role: str, n: int, seed: int, sandbox: Sandbox
) -> float:
    """Mean score of n held-out `box` questions when the picture is shown and Python is the only tool: what text-only
    demonstrations of image operations are worth on real pictures (2.2). Raises SandboxUnavailable."""
    task = VISION_TASKS["box"]
    rng = random.Random(f"{seed} {task.name}")
    examples = [task.sample(rng, "heldout") for _ in range(n)]
    await sandbox.run("pass")  # a machine that cannot confine code says so here, before the model is asked

    async def score(example: VisionExample) -> float:
        assert isinstance(example.media, Image)
        trace = await run_agent(
            engine,
            tokenizer,
            media,
            role=role,
            messages=[system(PYTHON_PROMPT), user(example.media, example.question)],
            tools=[Python(sandbox, example.media)],
            limits=Limits(max_turns=3, max_context_tokens=1024, max_turn_tokens=CODE_TOKENS),
            sampling=Sampling(max_tokens=CODE_TOKENS, temperature=0.0),
            declare_tools=False,
        )
        return task.score(trace.final_text, example.gold)

    # One after another: a sandbox answers by the clock, and what is computed must not depend on the clock.
    return sum([await score(example) for example in examples]) / n


async def evaluate_vision(
    engine: Engine, tokenizer: Tokenizer, media: MediaSpec, role: str, n: int, seed: int
) -> dict[str, VisionResult]:
    """n held-out examples per task, greedy."""
    results: dict[str, VisionResult] = {}
    for task in VISION_TASKS.values():
        rng = random.Random(f"{seed} {task.name}")
        examples = [task.sample(rng, "heldout") for _ in range(n)]
        texts = await asyncio.gather(*(answer(engine, tokenizer, media, role, example) for example in examples))
        answered = [Answered(e, t, task.score(t, e.gold)) for e, t in zip(examples, texts, strict=True)]
        mean = sum(a.score for a in answered) / n
        results[task.name] = VisionResult(mean, chance(task.name, examples), n, answered)
    return results


async def answer(engine: Engine, tokenizer: Tokenizer, media: MediaSpec, role: str, example: VisionExample) -> str:
    trace = await run_agent(
        engine,
        tokenizer,
        media,
        role=role,
        messages=[user(example.media, example.question)],
        tools=[],
        limits=Limits(max_turns=1, max_context_tokens=512, max_turn_tokens=ANSWER_TOKENS),
        sampling=Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0),
        declare_tools=False,
    )
    return trace.final_text
