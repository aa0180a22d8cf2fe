"""The same task in other words, and with instructions whose following is checked by hand here."""

import asyncio
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.chat.messages import Image, assistant
from baltoro.rollout.conform import conform
from baltoro.rollout.desktop import env as desktop
from baltoro.rollout.env import Env, Session, Step
from baltoro.rollout.prompts import CONSTRAINTS, diversified, instructed
from baltoro.rollout.questions import questions

TEMPLATES = ("{prompt}", "Please: {prompt}", "{prompt}\nBe quick. {word}")
FOLLOWED = {
    "at-most-words": ({"n": 3}, "one two three", "one two three four"),
    "at-least-words": ({"n": 3}, "one two three", "one two"),
    "include-word": ({"word": "stream"}, "The Stream.", "the streams"),
    "exclude-word": ({"word": "is"}, "this isle", "it is"),
    "lower-case": ({}, "quiet 1.", "Loud"),
    "no-commas": ({}, "one two", "one, two"),
    "bullets": ({"n": 2}, "so\n- a\n- b", "- a\n- b\n- c"),
    "ends-with": ({"phrase": "I am done."}, "x. I am done.\n", "I am done. x"),
    "json": ({}, '{"a": [1]}', "a: 1"),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.name)
def test_constraints_by_hand(constraint) -> None:  # pyright: ignore[reportMissingParameterType, reportUnknownParameterType]
    parameters, good, bad = FOLLOWED[constraint.name]
    assert constraint.holds(good, parameters)
    assert not constraint.holds(bad, parameters)
    drawn = constraint.draw(random.Random(0))
    assert drawn.keys() == parameters.keys()
    assert "{" not in constraint.text.format(**drawn)


def answer(env: Env, seed: int, text: str) -> tuple[str, Step]:
    async def main() -> tuple[str, Step]:
        session = Session(env)
        messages = await session.reset(json.loads(json.dumps(env.sample(seed))), seed)
        step = await session.step(assistant(text))
        await session.close()
        return "\n".join(f"{m.role}: {m.text}" for m in messages), step

    return asyncio.run(main())


def test_a_prompt_in_other_words_keeps_its_pictures() -> None:
    env = diversified(desktop, TEMPLATES, ("You use computers.", "You are careful."))
    tasks = [env.sample(seed) for seed in range(40)]
    assert {task["template"] for task in tasks} == set(TEMPLATES)
    assert {task["system"] for task in tasks} == {"You use computers.", "You are careful."}
    assert all(task.items() >= desktop.sample(seed).items() for seed, task in enumerate(tasks))
    text, _ = answer(env, next(s for s, task in enumerate(tasks) if task["template"] == TEMPLATES[1]), "")
    assert text.splitlines()[1].startswith("user: Please: Press the buttons")

    async def parts() -> list[type]:
        session = Session(env)
        messages = await session.reset(tasks[0], 0)
        await session.close()
        return [type(part) for part in messages[-1].content]

    assert Image in asyncio.run(parts())
    with pytest.raises(ValueError, match=r"must contain \{prompt\} once"):
        diversified(desktop, ("no place",))


def test_instructions_are_told_and_judged_beside_the_task() -> None:
    env = instructed(questions("train"), 0.5, (2, 2))
    words = {c.name: c for c in CONSTRAINTS}

    def told(seed: int) -> list[str]:
        return [words[i["name"]].text.format(**i["parameters"]) for i in env.sample(seed)["instructions"]]

    def followed(seed: int) -> int:
        """Of the two, by an answer without a word."""
        return sum(words[i["name"]].holds("", i["parameters"]) for i in env.sample(seed)["instructions"])

    for marks in (0, 1, 2):
        seed = next(seed for seed in range(99) if followed(seed) == marks)
        text, step = answer(env, seed, "")
        assert len(told(seed)) == 2
        assert text.endswith("\n".join(told(seed)))
        signals = step.info["signals"]
        assert (signals["instructions"], signals["all-instructions"]) == (marks / 2, float(marks == 2))
        assert step.reward == signals["perf"] + 0.25 * marks


@given(st.integers(0, 10**9))
def test_what_is_asked_together_can_be_done_together(seed: int) -> None:
    names = {each["name"] for each in instructed(desktop, 1.0, (1, 9)).sample(seed)["instructions"]}
    for pair in ({"at-most-words", "at-least-words"}, {"json", "ends-with"}, {"json", "bullets"}):
        assert not pair <= names


def test_wrappers_compose_once_each_and_conform() -> None:
    env = diversified(instructed(desktop, 1.0), TEMPLATES)
    assert [check for check in asyncio.run(conform(env)) if check.faults] == []
    with pytest.raises(ValueError, match="template in its rows already"):
        diversified(env, TEMPLATES).sample(0)
