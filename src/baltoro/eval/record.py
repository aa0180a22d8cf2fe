"""What an evaluation leaves for people to look at: examples with their pictures, one episode of each mode."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from baltoro.agent.trace import Trace, media_by_hash
from baltoro.chat.messages import Clip, Image
from baltoro.eval.evaluation import Evaluation, EvaluationConfig
from baltoro.eval.vision import VisionResult
from baltoro.eval.wide import Job
from baltoro.swarm.critical import critical_steps
from baltoro.world.corpora import FIELDS

_GALLERY = 4


def numbers(final: Evaluation, config: EvaluationConfig) -> dict[str, Any]:
    """An evaluation as results.json holds it."""
    return {
        "vision": {name: {"accuracy": r.accuracy, "chance": r.chance, "n": r.n} for name, r in final.vision.items()},
        "boxes_by_code": {"accuracy": final.boxes_by_code, "n": config.code_n},
        "wide_search": {
            "entities": list(config.entities),
            "budget": config.budget,
            **{mode: result.summary() for mode, result in final.wide.items()},
            "curve": {
                mode: [{"budget": b, **r.summary()} for b, r in zip(config.budgets, results, strict=True)]
                for mode, results in final.curve.items()
            },
        },
        "real_documents": {
            "packages": sum(len(job.task.names) for job in final.package_jobs),
            "fields": list(FIELDS),
            "budget": config.package_budget,
            **{mode: result.summary() for mode, result in final.packages.items()},
        },
    }


def gallery(results: Mapping[str, VisionResult]) -> list[dict[str, Any]]:
    """The first held-out examples of every task, right or wrong as they come."""
    return [
        {
            "task": name,
            "question": a.example.question,
            "answer": a.text,
            "gold": a.example.answer,
            "score": a.score,
            "caption": a.example.caption,
            "media": data_uris(a.example.media),
        }
        for name, result in results.items()
        for a in result.answered[:_GALLERY]
    ]


def episode(job: Job, trace: Trace) -> dict[str, Any]:
    """One task with its gold table and the whole tree of agents that worked on it."""
    task = job.task
    return {
        "task": {"prompt": task.prompt, "columns": list(task.columns), "gold": task.gold},
        "item_f1": trace.signals["perf"],
        "critical_steps": critical_steps(trace),
        "trace": trace.to_json(),
        "media": {key: data_uris(media) for key, media in media_by_hash(trace).items()},
    }


def data_uris(media: Image | Clip) -> list[str]:
    """PNG data URIs, one a frame."""
    frames: list[NDArray[np.uint8]] = [media.pixels] if isinstance(media, Image) else list(media.frames)
    uris: list[str] = []
    for frame in frames:
        buffer = io.BytesIO()
        PilImage.fromarray(frame).save(buffer, "PNG")
        uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris
