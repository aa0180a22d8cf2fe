"""Prompt diversification and instruction-following augmentation (appendix D): wrappers of environments.

What was drawn for a task is written into its row, so that a row alone says what an agent was asked, and what it is
judged by.
"""

import json
import random
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from baltoro.agent.trace import Trace
from baltoro.chat.messages import Part
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Reward, Task, metric

Change = Callable[[Task, World], World]


def _wrapped(env: Env, draw: Callable[[random.Random], dict[str, Any]], change: Change, judge: Judge) -> Env:
    def sample(seed: int) -> Task:
        task = env.sample(seed)
        added = draw(random.Random(f"{seed} {' '.join(sorted(task))}"))
        if double := added.keys() & task.keys():
            raise ValueError(f"{env.name} has {', '.join(sorted(double))} in its rows already; wrap it once")
        return task | added

    @asynccontextmanager
    async def open_world(task: Task, seed: int) -> AsyncGenerator[World]:
        async with env.open(task, seed) as world:
            yield change(task, world)

    return replace(env, sample=sample, open=open_world, judge=judge)


def diversified(env: Env, templates: Sequence[str] = ("{prompt}",), systems: Sequence[str] = ()) -> Env:
    """Each task in one of several forms. templates: texts around `{prompt}`, in whose place the prompt stands, pictures
    included. systems: what may stand for the system prompt. Raises ValueError for a template without its place."""
    for template in templates:
        if template.count("{prompt}") != 1:
            raise ValueError(f"the template {template!r} must contain {{prompt}} once")

    def draw(rng: random.Random) -> dict[str, Any]:
        drawn: dict[str, Any] = {"template": rng.choice(templates)}
        return drawn | ({"system": rng.choice(systems)} if systems else {})

    def change(task: Task, world: World) -> World:
        before, _, after = str(task["template"]).partition("{prompt}")
        parts: list[Part] = [before, *world.prompt, after]
        prompt = tuple(part for part in parts if part != "")
        return replace(world, prompt=prompt, system=task.get("system", world.system))

    return _wrapped(env, draw, change, env.judge)


@dataclass(frozen=True)
class Constraint:
    """An instruction whose following can be verified. draw: its parameters, as JSON holds them. text: the instruction,
    with the parameters in braces. holds: whether an answer follows it."""

    name: str
    draw: Callable[[random.Random], dict[str, Any]]
    text: str
    holds: Callable[[str, dict[str, Any]], bool]


_WORDS = ("therefore", "glacier", "stream", "exactly", "finally", "together")


def _is_json(answer: str, _: dict[str, Any]) -> bool:
    try:
        json.loads(answer)
    except ValueError:
        return False
    return True


def _count_words(answer: str) -> int:
    return len(answer.split())


CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(
        "at-most-words",
        lambda rng: {"n": rng.choice((20, 40, 80))},
        "Answer in at most {n} words.",
        lambda answer, p: _count_words(answer) <= p["n"],
    ),
    Constraint(
        "at-least-words",
        lambda rng: {"n": rng.choice((20, 40, 80))},
        "Answer in at least {n} words.",
        lambda answer, p: _count_words(answer) >= p["n"],
    ),
    Constraint(
        "include-word",
        lambda rng: {"word": rng.choice(_WORDS)},
        "Use the word {word}.",
        lambda answer, p: p["word"] in re.findall(r"\w+", answer.lower()),
    ),
    Constraint(
        "exclude-word",
        lambda rng: {"word": rng.choice(("the", "and", "is"))},
        "Do not use the word {word}.",
        lambda answer, p: p["word"] not in re.findall(r"\w+", answer.lower()),
    ),
    Constraint("lower-case", lambda rng: {}, "Write in lower case only.", lambda answer, _: answer == answer.lower()),
    Constraint("no-commas", lambda rng: {}, "Use no commas.", lambda answer, _: "," not in answer),
    Constraint(
        "bullets",
        lambda rng: {"n": rng.randint(2, 5)},
        "Give exactly {n} bullet points, each on a line that begins with '- '.",
        lambda answer, p: len(re.findall(r"^- \S", answer, re.MULTILINE)) == p["n"],
    ),
    Constraint(
        "ends-with",
        lambda rng: {"phrase": rng.choice(("That is all.", "I am done."))},
        "End with the words: {phrase}",
        lambda answer, p: answer.rstrip().endswith(p["phrase"]),
    ),
    Constraint("json", lambda rng: {}, "Answer with JSON and nothing else.", _is_json),
)

# Pairs that no answer, or hardly any, can follow together.
_APART = ({"at-most-words", "at-least-words"}, {"json", "ends-with"}, {"json", "bullets"}, {"json", "no-commas"},
          {"lower-case", "ends-with"}, {"exclude-word", "ends-with"})  # fmt: skip


def instructed(
    env: Env, weight: float, count: tuple[int, int] = (1, 3), constraints: Sequence[Constraint] = CONSTRAINTS
) -> Env:
    """Adds between count[0] and count[1] constraints to each task. Signals: `instructions`, the share that was
    followed, with `weight`; and the metric `all-instructions`, 1 where all were."""
    known = {constraint.name: constraint for constraint in constraints}

    def draw(rng: random.Random) -> dict[str, Any]:
        wanted = rng.randint(*count)
        chosen: list[dict[str, Any]] = []
        for constraint in rng.sample(list(constraints), len(constraints)):
            names = {each["name"] for each in chosen}
            if len(chosen) < wanted and not any(pair <= names | {constraint.name} for pair in _APART):
                chosen.append({"name": constraint.name, "parameters": constraint.draw(rng)})
        return {"instructions": chosen}

    def change(task: Task, world: World) -> World:
        texts = [known[each["name"]].text.format(**each["parameters"]) for each in task["instructions"]]
        return replace(world, prompt=(*world.prompt, "\n" + "\n".join(texts)))

    def followed(task: Task, trace: Trace) -> float:
        marks = [known[each["name"]].holds(trace.final_text, each["parameters"]) for each in task["instructions"]]
        return sum(marks) / len(marks)

    judge = Judge(
        *env.judge.examiners,
        Reward("instructions", followed, weight),
        metric("all-instructions", lambda task, trace: float(followed(task, trace) == 1.0)),
    )
    return _wrapped(env, draw, change, judge)
