"""Visual questions answered by engines that know all, half or nothing."""

import asyncio
import json
import random
import re

import pytest

from baltoro.agent.engine import Completion, Sampling
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence, user
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.eval.vision import VisionResult, evaluate_boxes_by_code, evaluate_vision
from baltoro.swarm.demonstrations import Demonstrator
from baltoro.tools.python import Sandbox, SandboxUnavailable
from baltoro.world.entities import World
from baltoro.world.scenes import COLOURS

N, SEED = 6, 3
TASKS = {"colour", "shape", "count", "box", "point", "polygon", "chart", "ocr", "digit", "motion", "event"}


def key(prompt: TokenSequence) -> tuple[object, ...]:
    """All that an engine is shown."""
    return tuple(prompt.ids), *(item.patches.tobytes() for item in prompt.media)


class Knowing:
    """Says what stands beside the prompt in a book, and nonsense to a prompt that it has not seen."""

    def __init__(self, tokenizer: Tokenizer, book: dict[tuple[object, ...], str]) -> None:
        self.tokenizer, self.book = tokenizer, book
        self.asked: list[tuple[Sampling, str]] = []

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        self.asked.append((sampling, role))
        text = completion_text(self.book.get(key(prompt), "nonsense"))
        return await ScriptedEngine(self.tokenizer, [text]).generate(prompt, sampling, role)


@pytest.fixture(scope="module")
def blind(tokenizer: Tokenizer, media_spec: MediaSpec) -> dict[str, VisionResult]:
    engine = ScriptedEngine(tokenizer, lambda prompt, role: completion_text("red"))
    return asyncio.run(evaluate_vision(engine, tokenizer, media_spec, "agent", N, SEED))


def book(blind: dict[str, VisionResult], tokenizer: Tokenizer, media_spec: MediaSpec) -> dict[tuple[object, ...], str]:
    """The gold answers by prompt: the picture, the question, and nothing else."""
    return {
        key(render([user(e.media, e.question)], tokenizer, media_spec, add_generation_prompt=True)): e.answer
        for result in blind.values()
        for e in (answered.example for answered in result.answered)
    }


def test_a_constant_answer_is_worth_its_frequency(blind: dict[str, VisionResult]) -> None:
    assert set(blind) == TASKS
    golds = [answered.example.answer for answered in blind["colour"].answered]
    assert blind["colour"].accuracy == pytest.approx(golds.count("red") / N)
    for name in ("shape", "count", "box", "point", "polygon", "digit", "motion", "event"):
        assert blind[name].accuracy == 0
    for result in blind.values():
        assert result.n == len(result.answered) == N
        assert 0 <= result.chance <= 1
        assert {answered.text for answered in result.answered} == {"red"}


async def test_who_knows_every_answer_scores_1(
    blind: dict[str, VisionResult], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    """So the prompts hold the whole question and fit, the answers fit, and every gold answer is right."""
    engine = Knowing(tokenizer, book(blind, tokenizer, media_spec))
    results = await evaluate_vision(engine, tokenizer, media_spec, "reader", N, SEED)
    assert {name: result.accuracy for name, result in results.items()} == dict.fromkeys(TASKS, 1)
    assert {name: r.chance for name, r in results.items()} == {name: r.chance for name, r in blind.items()}
    assert len(engine.asked) == N * len(TASKS)
    assert {role for _, role in engine.asked} == {"reader"}
    assert {sampling.temperature for sampling, _ in engine.asked} == {0}


async def test_who_knows_a_part_scores_a_part(
    blind: dict[str, VisionResult], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    known = book(blind, tokenizer, media_spec)
    engine = Knowing(tokenizer, {prompt: answer for i, (prompt, answer) in enumerate(known.items()) if i % N < 2})
    results = await evaluate_vision(engine, tokenizer, media_spec, "agent", N, SEED)
    del results["ocr"]  # nonsense resembles some words
    assert {name: result.accuracy for name, result in results.items()} == pytest.approx(
        dict.fromkeys(TASKS - {"ocr"}, 2 / N)
    )


async def test_another_seed_asks_other_questions(
    blind: dict[str, VisionResult], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    engine = Knowing(tokenizer, book(blind, tokenizer, media_spec))
    results = await evaluate_vision(engine, tokenizer, media_spec, "agent", N, SEED + 1)
    del results["ocr"]
    assert sum(result.accuracy for result in results.values()) < 0.1


@pytest.fixture
async def sandbox() -> Sandbox:
    sandbox = Sandbox(processes=1, timeout_s=60)
    try:
        await sandbox.run("")
    except SandboxUnavailable as error:
        pytest.skip(f"this kernel does not allow the confinement: {error}")
    return sandbox


async def test_code_on_the_shown_picture_finds_boxes(
    tokenizer: Tokenizer, media_spec: MediaSpec, sandbox: Sandbox
) -> None:
    """The program that the demonstrations teach is right on held-out pictures. It goes by the colour alone, so only
    another object of that colour may mislead it."""
    expert = Demonstrator(World(0, "train", per_kind=1))
    taught = [expert.pixels(random.Random(seed)) for seed in range(60)]
    programs = {
        name: message.tool_calls[0].arguments
        for _, question, message, *_ in taught
        for name in COLOURS
        if f" {name} " in question.text
    }
    assert set(programs) == set(COLOURS)

    def script(prompt: str, role: str) -> str:
        printed = re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
        if printed:
            return completion_text(printed[0].strip())
        question = prompt.split("<|im_user|>")[1]
        [colour] = [name for name in COLOURS if f" {name} " in question]
        return completion_text(calls=[("python", json.loads(programs[colour]))])

    engine = ScriptedEngine(tokenizer, script)
    score = await evaluate_boxes_by_code(engine, tokenizer, media_spec, "agent", 6, SEED, sandbox)
    assert score > 0.95
    assert len(engine.prompts) == 12
    assert all(len(prompt.media) == 1 for prompt in engine.prompts)
    guess = ScriptedEngine(tokenizer, lambda prompt, role: completion_text("0 0 31 31"))
    assert await evaluate_boxes_by_code(guess, tokenizer, media_spec, "agent", 6, SEED, sandbox) < 0.2
