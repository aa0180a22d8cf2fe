"""What an evaluation leaves on disk: numbers, examples with their pictures, one episode."""

import base64
import io
import json
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from baltoro.agent.scripted import Script, ScriptedEngine
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Clip, Image, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.eval.evaluation import Evaluation, EvaluationConfig
from baltoro.eval.record import data_uris, episode, gallery, numbers
from baltoro.eval.vision import Answered, VisionResult
from baltoro.eval.wide import Job, WideResult, evaluate_wide, held_out_jobs
from baltoro.swarm.wide import Library, WideRules
from baltoro.world.tasks import WideSearch
from baltoro.world.vision import VISION_TASKS

RULES = WideRules(max_context_tokens=200_000, max_turn_tokens=20_000, subagent_turn_tokens=2000)


def decoded(uri: str) -> Any:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(PilImage.open(io.BytesIO(base64.b64decode(data))))


def test_data_uris_keep_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    [uri] = data_uris(Image(pixels[0]))
    assert (decoded(uri) == pixels[0]).all()
    frames = data_uris(Clip(pixels, fps=2.0))
    assert len(frames) == 3
    assert all((decoded(uri) == frame).all() for uri, frame in zip(frames, pixels, strict=True))


def vision_result(task: str, n: int) -> VisionResult:
    rng = random.Random(0)
    examples = [VISION_TASKS[task].sample(rng, "heldout") for _ in range(n)]
    answered = [Answered(e, f"answer {i}", i / n) for i, e in enumerate(examples)]
    return VisionResult(0.5, 0.25, n, answered)


def test_the_gallery_takes_the_first_examples_as_they_come() -> None:
    results = {"colour": vision_result("colour", 7), "motion": vision_result("motion", 2)}
    shown = gallery(results)
    assert [(g["task"], g["answer"]) for g in shown] == [
        *(("colour", f"answer {i}") for i in range(4)),
        ("motion", "answer 0"),
        ("motion", "answer 1"),
    ]
    for g, answered in zip(shown, [*results["colour"].answered[:4], *results["motion"].answered], strict=True):
        example = answered.example
        assert (g["question"], g["gold"], g["caption"], g["score"]) == (
            example.question,
            example.answer,
            example.caption,
            answered.score,
        )
        frames = [example.media.pixels] if isinstance(example.media, Image) else list(example.media.frames)
        assert len(g["media"]) == len(frames)
        assert (decoded(g["media"][-1]) == frames[-1]).all()
    assert json.loads(json.dumps(shown)) == shown


def test_numbers() -> None:
    def wide(f1: float, n: int) -> WideResult:
        trace = Trace("agent", (), (), (), (), (), (), "completed", "", trainable=False)
        return WideResult(f1, 10 * f1, 20 * f1, 3.0, [trace] * n)

    def row(f1: float, n: int, **more: int) -> dict[str, float]:
        return {**more, "item_f1": f1, "critical_steps": 10 * f1, "total_steps": 20 * f1, "n": n}

    config = EvaluationConfig(6, 2, 3, (4, 5), 10, (4, 8), 2, 2, 12)
    jobs = [Job(WideSearch(("a", "b"), ("Version",), {}), Library([]))] * 3
    final = Evaluation(
        vision={"colour": VisionResult(0.5, 0.25, 6, [])},
        boxes_by_code=None,
        jobs=[],
        wide={"single": wide(0.2, 3), "swarm": wide(0.6, 3)},
        curve={"single": [wide(0.1, 2), wide(0.3, 2)], "swarm": [wide(0.4, 2), wide(0.5, 2)]},
        package_jobs=jobs,
        packages={"single": wide(0.25, 3), "swarm": wide(0.75, 3)},
    )
    assert numbers(final, config) == {
        "vision": {"colour": {"accuracy": 0.5, "chance": 0.25, "n": 6}},
        "boxes_by_code": {"accuracy": None, "n": 2},
        "wide_search": {
            "entities": [4, 5],
            "budget": 10,
            "single": row(0.2, 3),
            "swarm": row(0.6, 3),
            "curve": {
                "single": [row(0.1, 2, budget=4), row(0.3, 2, budget=8)],
                "swarm": [row(0.4, 2, budget=4), row(0.5, 2, budget=8)],
            },
        },
        "real_documents": {
            "packages": 6,
            "fields": ["Version", "License", "Requires-Python"],
            "budget": 12,
            "single": row(0.25, 3),
            "swarm": row(0.75, 3),
        },
    }


async def test_an_episode_shows_the_task_and_every_agent(
    tokenizer: Tokenizer, media_spec: MediaSpec, swarm_script: Script
) -> None:
    [job] = held_out_jobs(1, 3, 3, seed=4)
    engine = ScriptedEngine(tokenizer, swarm_script)
    result = await evaluate_wide(
        engine, tokenizer, media_spec, [job], mode="swarm", role="orchestrator", budget=6, rules=RULES, seed=0
    )
    told: dict[str, Any] = json.loads(json.dumps(episode(job, result.traces[0])))
    assert told["task"] == {"prompt": job.task.prompt, "columns": list(job.task.columns), "gold": job.task.gold}
    assert (told["item_f1"], told["critical_steps"], told["media"]) == (1, 6, {})
    stages = [turn["children"] for turn in told["trace"]["turns"]]
    assert [len(stage) for stage in stages] == [0, 3, 0]
    assert "\n".join(child["final_text"] for child in stages[1]) == told["trace"]["final_text"]


def test_an_episode_carries_the_pictures_that_its_agents_saw() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    trace = Trace("agent", (user(Image(pixels), "?"),), (), (), (), (), (), "completed", "", trainable=False)
    told: dict[str, Any] = episode(Job(WideSearch((), (), {}), Library([])), trace.with_signals(perf=0.5))
    [(name, [uri])] = told["media"].items()
    assert told["trace"]["prompt"][0]["content"][0]["hash"] == name
    assert (decoded(uri) == pixels).all()
    assert told["item_f1"] == pytest.approx(0.5)
