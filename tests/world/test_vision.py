import json
import random

import numpy as np
import pytest

from baltoro.chat.messages import Clip, Image
from baltoro.world.scenes import Split
from baltoro.world.vision import VISION_TASKS, VisionExample, chance, scene_document

TASKS = sorted(VISION_TASKS)
SPLITS: tuple[Split, ...] = ("train", "heldout")


def examples(task: str, seed: int, n: int, split: Split = "heldout") -> list[VisionExample]:
    rng = random.Random(seed)
    return [VISION_TASKS[task].sample(rng, split) for _ in range(n)]


def pixels(example: VisionExample) -> np.ndarray:
    return example.media.pixels if isinstance(example.media, Image) else example.media.frames


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_example_is_small_and_its_answer_is_right(task: str, split: Split):
    for example in examples(task, 1, 60, split):
        assert example.task == task
        assert VISION_TASKS[task].score(example.answer, example.gold) == pytest.approx(1)
        # A gold answer that went through a file scores the same.
        assert VISION_TASKS[task].score(example.answer, json.loads(json.dumps(example.gold))) == pytest.approx(1)
        assert len(example.question.split()) <= 8
        for side in pixels(example).shape[-3:-1]:
            assert side in (32, 48, 64, 80, 96)
        if isinstance(example.media, Clip):
            assert len(example.media.frames) % 4 == 0


@pytest.mark.parametrize("task", TASKS)
def test_what_was_asked_is_among_all_questions(task: str):
    for example in examples(task, 3, 30):
        assert [q.answer for q in example.questions if example.question in q.wordings] == [example.answer]


def test_all_questions_about_a_scene_follow_from_its_description():
    """Answers are worked out again from the caption, `red circle 4 7 12 15; ...`."""
    seen: set[str] = set()
    for example in (e for task in ("colour", "count", "polygon") for e in examples(task, 4, 40)):
        things = [part.split() for part in example.caption.split("; ")]
        for wordings, answer in example.questions:
            assert len(set(wordings)) == 3
            what, *words = wordings[0].rstrip("?").replace("crosses", "cross").split()
            seen.add(what)
            if what == "how":  # many circles, many red objects
                named = words[1] if len(words) == 3 else words[1].removesuffix("s" if words[1] != "cross" else "")
                assert int(answer) == sum(named in thing[:2] for thing in things)
                continue
            named = [word for word in words if any(word in thing[:2] for thing in things)]
            (thing,) = [thing for thing in things if set(named) <= set(thing[:2])]
            x0, y0, x1, y1 = map(int, thing[2:])
            if what in ("colour", "shape"):
                assert answer == thing[what == "shape"]
            elif what == "box":
                assert answer.split() == thing[2:]
            elif what == "point":
                x, y = map(int, answer.split())
                assert abs(2 * x - x0 - x1) <= 2
                assert abs(2 * y - y0 - y1) <= 2
            else:
                xs, ys = map(int, answer.split()[::2]), map(int, answer.split()[1::2])
                assert set(xs) >= {x0, x1}
                assert set(ys) == {y0, y1}
    assert seen == {"how", "colour", "shape", "box", "point", "outline"}


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_everything(task: str):
    for first, again, other in zip(examples(task, 7, 20), examples(task, 7, 20), examples(task, 8, 20), strict=True):
        assert (first.question, first.answer, first.gold, first.caption) == (
            again.question,
            again.answer,
            again.gold,
            again.caption,
        )
        np.testing.assert_array_equal(pixels(first), pixels(again))
        assert pixels(first).shape != pixels(other).shape or (pixels(first) != pixels(other)).any()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "text", ["", " ", ";", "!", "1.5", "-3", "3 apples", "1 2 3", "9" * 5000, "٣", "nan nan", "1 1; x y"]
)
def test_text_that_does_not_parse_scores_nothing(task: str, text: str):
    for example in examples(task, 2, 5):
        assert VISION_TASKS[task].score(text, example.gold) <= (0.5 if task == "ocr" else 0)


def test_scores_by_hand():
    score = {name: task.score for name, task in VISION_TASKS.items()}
    assert score["box"]("0 0 8 16", [0, 0, 16, 16]) == pytest.approx(2 * 0.5 / 2)
    assert score["box"]("0 0 16 16; 0 0 16 16", [0, 0, 16, 16]) == pytest.approx(2 / 3)
    # 40 x 30 pixels: a unit is 1.25 px across, so 2 units are 2.5 px, one sigma of the 50 px diagonal.
    assert score["point"]("12 8", {"point": [10, 8], "size": [40, 30]}) == pytest.approx(np.exp(-0.5))
    assert score["polygon"]("0 0 16 0 0 16", [0, 0, 16, 0, 16, 16, 0, 16]) == pytest.approx(0.5, abs=0.02)
    assert score["count"]("4", 5) == pytest.approx(0.8)
    assert score["count"]("4 5", 5) == 0
    assert score["ocr"]("bal cos", "bal cor") == pytest.approx(6 / 7)
    assert score["chart"](" Red ", "red") == 1
    assert score["chart"]("5", 5) == 1
    assert score["event"]("4", 5) == 0


@pytest.mark.parametrize(
    ("task", "at_least", "at_most"),
    [
        ("colour", 1 / 7, 0.21),
        ("shape", 1 / 4, 0.32),
        ("digit", 1 / 10, 0.15),
        ("motion", 1 / 4, 0.32),
        ("chart", 1 / 9, 0.21),  # colours 1/7 and heights 1/9, half and half
        ("event", 0.2, 0.3),  # kinds 1/3 and seconds 1/7, half and half
        ("count", 0.55, 0.61),  # always 3: (0 + 1/2 + 1 + 3/4 + 3/5) / 5 = 0.57
    ],
)
def test_chance_is_that_of_the_best_blind_answer(task: str, at_least: float, at_most: float):
    level = chance(task, examples(task, 1, 500))
    assert at_least - 0.02 <= level <= at_most
    assert level == chance(task, examples(task, 1, 500))


def test_chance_is_that_of_these_very_examples():
    one, three = (next(e for e in examples("count", 1, 100) if e.gold == gold) for gold in (1, 3))
    assert chance("count", [three, three]) == 1
    # Always 1: (1 + 1/3) / 2; always 3: (0 + 1) / 2; the other's answer: (0 + 1/3) / 2.
    assert chance("count", [one, three]) == pytest.approx(2 / 3)


def test_counts_are_even_and_the_picture_size_does_not_tell():
    drawn = examples("count", 3, 4000)
    for small in (True, False):
        counts = [int(e.answer) for e in drawn if (pixels(e).size == 64 * 64 * 3) == small]
        shares = np.bincount(counts, minlength=6)[1:] / len(counts)
        assert np.abs(shares - 0.2).max() < 0.05


def test_documents_that_are_pictures():
    rng = random.Random(4)
    answers = [scene_document(rng, "heldout").answer for _ in range(40)]
    assert any(" " in answer for answer in answers)  # lettering
    assert any(" " not in answer for answer in answers)  # charts
