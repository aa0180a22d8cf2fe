"""The visual task families: question, media, gold answer and score, each a pure function of the random source.

Answers are as short as they can be: a lower-case word, a small integer, or integers 0..31 in 32nds of the picture's
width and height from the top left, single spaces between. How each family keeps its splits apart stands with what it
draws (`scenes`, `charts`, `lettering`, `digits`, `clips`).
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from baltoro.chat.messages import Clip, Image
from baltoro.score.counting import count_score
from baltoro.score.grounding import Box, box_f1
from baltoro.score.points import Point, point_f1
from baltoro.score.polygons import polygon_iou
from baltoro.score.text import edit_similarity
from baltoro.world.charts import sample_chart
from baltoro.world.clips import sample_event, sample_motion
from baltoro.world.digits import sample_digit
from baltoro.world.lettering import sample_lettering
from baltoro.world.scenes import ALONE, COLOUR_NAMES, CROWD, FEW, GRID, SHAPES, Scene, Split, Thing, place


@dataclass(frozen=True, eq=False)
class VisionExample:
    """`gold` is what `VisionTask.score` compares with: JSON-able. `caption` describes the media completely."""

    task: str
    media: Image | Clip
    question: str
    answer: str
    gold: object
    caption: str


@dataclass(frozen=True)
class VisionTask:
    """A family. `score(answer_text, gold)` is in 0..1; text that does not parse scores 0, never by chance."""

    name: str
    sample: Callable[[random.Random, Split], VisionExample]
    score: Callable[[str, object], float]


# Scenes

_SCENE_SIZES = (1, 1, 2, 2, 3)
"""How many objects a scene has, each entry equally often."""
_OUTLINED = ("square", "triangle")
_MAX_COUNT = 5
_MAX_OTHERS = 2

Kind = tuple[str, str]
"""Colour and shape."""


def _kind(rng: random.Random, shapes: Sequence[str] = SHAPES) -> Kind:
    return rng.choice(COLOUR_NAMES), rng.choice(shapes)


def _other(rng: random.Random, differs: Callable[[Kind], bool]) -> Kind:
    while True:
        kind = _kind(rng)
        if differs(kind):
            return kind


def _scene(rng: random.Random, split: Split, target: Kind, differs: Callable[[Kind], bool]) -> Scene:
    """A scene with exactly one object of the target's kind; `differs` holds for the kind of every other."""
    while True:
        others = [_other(rng, differs) for _ in range(rng.choice(_SCENE_SIZES) - 1)]
        scene = place(rng, split, FEW if others else ALONE, [target, *others])
        if scene is not None:
            return scene


def _colour(rng: random.Random, split: Split) -> VisionExample:
    colour, shape = target = _kind(rng)
    scene = _scene(rng, split, target, lambda kind: kind[1] != shape)
    question = rng.choice((f"colour of the {shape}?", f"what colour is the {shape}?", f"which colour has the {shape}?"))
    return VisionExample("colour", scene.render(), question, colour, colour, scene.caption())


def _shape(rng: random.Random, split: Split) -> VisionExample:
    colour, shape = target = _kind(rng)
    scene = _scene(rng, split, target, lambda kind: kind[0] != colour)
    question = rng.choice(
        (f"shape of the {colour} object?", f"what shape is {colour}?", f"which shape has the {colour} object?")
    )
    return VisionExample("shape", scene.render(), question, shape, shape, scene.caption())


def _count(rng: random.Random, split: Split) -> VisionExample:
    by_shape = rng.random() < 0.5
    colour, shape = _kind(rng)

    def counted(kind: Kind) -> bool:
        return kind[1] == shape if by_shape else kind[0] == colour

    # Both numbers and the picture's size are fixed before any placing, so that what fits does not shift the answers;
    # and all pictures are of the roomy kind, so that their size does not tell them.
    count, others = rng.randint(1, _MAX_COUNT), rng.randint(0, _MAX_OTHERS)
    room = replace(CROWD, sides=(rng.choice(CROWD.sides),))
    scene = None
    while scene is None:
        kinds = [_other(rng, counted) for _ in range(count)]
        kinds += [_other(rng, lambda kind: not counted(kind)) for _ in range(others)]
        scene = place(rng, split, room, kinds)
    what = ("crosses" if shape == "cross" else f"{shape}s") if by_shape else f"{colour} objects"
    question = rng.choice((f"how many {what}?", f"count the {what}", f"number of {what}?"))
    return VisionExample("count", scene.render(), question, str(count), count, scene.caption())


def _referred(rng: random.Random, split: Split, shapes: Sequence[str] = SHAPES) -> tuple[Scene, Thing]:
    """A scene and its one thing of some colour and shape."""
    target = _kind(rng, shapes)
    scene = _scene(rng, split, target, lambda kind: kind != target)
    return scene, next(thing for thing in scene.things if (thing.colour, thing.shape) == target)


def _box(rng: random.Random, split: Split) -> VisionExample:
    scene, thing = _referred(rng, split)
    question = rng.choice((f"box of the {thing.name}", f"box the {thing.name}", f"bounds of the {thing.name}"))
    gold = scene.box(thing)
    return VisionExample("box", scene.render(), question, _numbers(gold), gold, scene.caption())


def _point(rng: random.Random, split: Split) -> VisionExample:
    scene, thing = _referred(rng, split)
    question = rng.choice((f"point at the {thing.name}", f"centre of the {thing.name}", f"where is the {thing.name}?"))
    point = scene.point(thing)
    gold = {"point": point, "size": [scene.width, scene.height]}
    return VisionExample("point", scene.render(), question, _numbers(point), gold, scene.caption())


def _polygon(rng: random.Random, split: Split) -> VisionExample:
    scene, thing = _referred(rng, split, _OUTLINED)
    question = rng.choice((f"outline of the {thing.name}", f"outline the {thing.name}", f"corners of the {thing.name}"))
    gold = scene.outline(thing)
    return VisionExample("polygon", scene.render(), question, _numbers(gold), gold, scene.caption())


# Charts, text, digits, clips


def _chart(rng: random.Random, split: Split) -> VisionExample:
    chart = sample_chart(rng, split)
    kind = rng.randrange(4)
    if kind == 0:
        question, gold = rng.choice(("tallest bar?", "which bar is tallest?")), chart.tallest.colour
    elif kind == 1:
        question, gold = rng.choice(("lowest bar?", "which bar is lowest?")), chart.lowest.colour
    else:
        bar = rng.choice(chart.bars)
        question = rng.choice((f"height of the {bar.colour} bar?", f"how tall is the {bar.colour} bar?"))
        gold = bar.height
    return VisionExample("chart", chart.render(rng), question, str(gold), gold, chart.caption())


def _ocr(rng: random.Random, split: Split) -> VisionExample:
    lettering = sample_lettering(rng, split)
    question = rng.choice(("read the text", "what does it say?", "what is written?"))
    return VisionExample(
        "ocr", lettering.render(rng), question, lettering.text, lettering.text, f"text {lettering.text}"
    )


def _digit(rng: random.Random, split: Split) -> VisionExample:
    digit = sample_digit(rng, split)
    question = rng.choice(("which digit?", "what digit is this?", "read the digit"))
    return VisionExample("digit", digit.render(rng), question, str(digit.value), digit.value, f"digit {digit.value}")


def _motion(rng: random.Random, split: Split) -> VisionExample:
    motion = sample_motion(rng, split)
    question = rng.choice(
        (f"where does the {motion.shape} move?", f"which way does the {motion.shape} move?", "direction of motion?")
    )
    return VisionExample("motion", motion.render(rng), question, motion.direction, motion.direction, motion.caption())


def _event(rng: random.Random, split: Split) -> VisionExample:
    event = sample_event(rng, split)
    if rng.random() < 0.5:
        question, gold = rng.choice(("what happens?", f"what happens to the {event.shape}?")), event.kind
    else:
        question, gold = rng.choice(("when does it happen?", "at which second does it happen?")), event.second
    return VisionExample("event", event.render(rng), question, str(gold), gold, event.caption())


# Scores


def _numbers(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


_INTEGER = re.compile("[0-9]{1,3}")


def _integers(text: str) -> list[int] | None:
    """The integers of a text that has nothing else, else None."""
    words = text.split()
    return [int(word) for word in words] if words and all(map(_INTEGER.fullmatch, words)) else None


def _groups(text: str, multiple: int) -> list[list[int]] | None:
    """Semicolon-separated lists of integers, each of a multiple of `multiple` long, else None."""
    groups = [_integers(group) for group in text.split(";")]
    if any(group is None or len(group) % multiple for group in groups):
        return None
    return cast(list[list[int]], groups)


def _pairs(values: Sequence[int], across: float, down: float) -> list[tuple[float, float]]:
    return [(x * across, y * down) for x, y in zip(values[::2], values[1::2], strict=True)]


def score_exact(text: str, gold: object) -> float:
    return float(text.strip().lower() == str(gold))


def score_count(text: str, gold: object) -> float:
    numbers = _integers(text)
    return count_score(numbers[0], cast(int, gold)) if numbers and len(numbers) == 1 else 0.0


def score_text(text: str, gold: object) -> float:
    return edit_similarity(text, cast(str, gold))


def score_box(text: str, gold: object) -> float:
    groups = _groups(text, 4)
    if groups is None:
        return 0.0
    boxes = [cast(Box, tuple(group[i : i + 4])) for group in groups for i in range(0, len(group), 4)]
    return box_f1(boxes, [cast(Box, gold)])


def score_point(text: str, gold: object) -> float:
    groups = _groups(text, 2)
    if groups is None:
        return 0.0
    target = cast(dict[str, list[int]], gold)
    width, height = target["size"]
    predicted: list[Point] = [point for group in groups for point in _pairs(group, width / GRID, height / GRID)]
    return point_f1(predicted, _pairs(target["point"], width / GRID, height / GRID), (width, height))


_RASTER = 8 * GRID
"""Polygons are compared on a square of this many pixels: IoU does not change when an axis is stretched."""


def score_polygon(text: str, gold: object) -> float:
    groups = _groups(text, 2)
    if groups is None:
        return 0.0
    predicted = [_pairs(group, _RASTER / GRID, _RASTER / GRID) for group in groups]
    target = _pairs(cast(list[int], gold), _RASTER / GRID, _RASTER / GRID)
    return polygon_iou(predicted, [target], _RASTER, _RASTER)


VISION_TASKS: dict[str, VisionTask] = {
    task.name: task
    for task in (
        VisionTask("colour", _colour, score_exact),
        VisionTask("shape", _shape, score_exact),
        VisionTask("count", _count, score_count),
        VisionTask("box", _box, score_box),
        VisionTask("point", _point, score_point),
        VisionTask("polygon", _polygon, score_polygon),
        VisionTask("chart", _chart, score_exact),
        VisionTask("ocr", _ocr, score_text),
        VisionTask("digit", _digit, score_exact),
        VisionTask("motion", _motion, score_exact),
        VisionTask("event", _event, score_exact),
    )
}


# Chance

_SHIFTS = 8
_CONSTANTS = 100


def chance(task: str, n: int, seed: int) -> float:
    """What a blind model would score on n held-out examples, at best.

    The better of answering with another example's answer and of the best constant answer (of the most frequent ones).
    Questions for a number and questions for a word are judged apart, because the question alone tells them.
    """
    family, rng = VISION_TASKS[task], random.Random(seed)
    examples = [family.sample(rng, "heldout") for _ in range(n)]
    asks_number = [isinstance(example.gold, int) for example in examples]
    total = 0.0
    for form in sorted(set(asks_number)):
        alike = [example for example, number in zip(examples, asks_number, strict=True) if number == form]
        total += len(alike) * max(_borrowed(family, alike), _constant(family, alike))
    return total / n


def _borrowed(family: VisionTask, examples: Sequence[VisionExample]) -> float:
    """Mean score when each example gets the answers of the _SHIFTS others before it, cyclically; 0 without others."""
    shifts = range(1, min(1 + _SHIFTS, len(examples)))
    scores = [
        family.score(examples[i - shift].answer, example.gold) for i, example in enumerate(examples) for shift in shifts
    ]
    return sum(scores) / max(1, len(scores))


def _constant(family: VisionTask, examples: Sequence[VisionExample]) -> float:
    """Mean score of the best single answer."""
    answers = [answer for answer, _ in Counter(example.answer for example in examples).most_common(_CONSTANTS)]
    return max(sum(family.score(answer, example.gold) for example in examples) for answer in answers) / len(examples)


class SceneDocument(NamedTuple):
    """A picture that states one fact, for documents that are pictures."""

    image: Image
    question: str
    answer: str


def scene_document(rng: random.Random, split: Split) -> SceneDocument:
    """A bar chart or a line of text, each half of the time."""
    example = (_chart if rng.random() < 0.5 else _ocr)(rng, split)
    assert isinstance(example.media, Image)
    return SceneDocument(example.media, example.question, example.answer)
