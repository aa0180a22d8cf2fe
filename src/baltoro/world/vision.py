"""The visual task families: question, media, gold answer and score, each a pure function of the random source.

Answers are as short as they can be: a lower-case word, a small integer, or integers 0..31 in 32nds of the picture's
width and height from the top left, single spaces between. How each family keeps its splits apart stands with what it
draws (`scenes`, `charts`, `lettering`, `digits`, `clips`).
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from baltoro.chat.messages import Clip, Image
from baltoro.world.answers import score_box, score_count, score_exact, score_point, score_polygon, score_text
from baltoro.world.charts import sample_chart
from baltoro.world.clips import sample_event, sample_motion
from baltoro.world.digits import sample_digit
from baltoro.world.lettering import sample_lettering
from baltoro.world.scenes import ALONE, COLOUR_NAMES, CROWD, FEW, SHAPES, Scene, Split, Thing, place


class Question(NamedTuple):
    """One question in all of its wordings."""

    wordings: tuple[str, ...]
    answer: str


@dataclass(frozen=True, eq=False)
class VisionExample:
    """`gold` is what `VisionTask.score` compares with: JSON-able. `caption` describes the media completely;
    `questions` are all that can be asked about them."""

    task: str
    media: Image | Clip
    question: str
    answer: str
    gold: object
    caption: str
    questions: tuple[Question, ...]


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


_WORDINGS = {
    "colour": ("colour of the {}?", "what colour is the {}?", "which colour has the {}?"),
    "shape": ("shape of the {} object?", "what shape is {}?", "which shape has the {} object?"),
    "count": ("how many {}?", "count the {}", "number of {}?"),
    "box": ("box of the {}", "box the {}", "bounds of the {}"),
    "point": ("point at the {}", "centre of the {}", "where is the {}?"),
    "polygon": ("outline of the {}", "outline the {}", "corners of the {}"),
}


def _ask(task: str, subject: str) -> tuple[str, ...]:
    return tuple(wording.format(subject) for wording in _WORDINGS[task])


def _several(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _example(rng: random.Random, task: str, scene: Scene, subject: str, answer: str, gold: object) -> VisionExample:
    question = rng.choice(_ask(task, subject))
    return VisionExample(task, scene.render(), question, answer, gold, scene.caption(), _about(scene))


def _about(scene: Scene) -> tuple[Question, ...]:
    """All questions that have one answer in the scene."""
    colours = Counter(thing.colour for thing in scene.things)
    shapes = Counter(thing.shape for thing in scene.things)
    kinds = Counter(thing.name for thing in scene.things)
    found = [Question(_ask("count", f"{colour} objects"), str(n)) for colour, n in colours.items()]
    found += [Question(_ask("count", _several(shape)), str(n)) for shape, n in shapes.items()]
    for thing in scene.things:
        if shapes[thing.shape] == 1:
            found.append(Question(_ask("colour", thing.shape), thing.colour))
        if colours[thing.colour] == 1:
            found.append(Question(_ask("shape", thing.colour), thing.shape))
        if kinds[thing.name] == 1:
            found.append(Question(_ask("box", thing.name), _numbers(scene.box(thing))))
            found.append(Question(_ask("point", thing.name), _numbers(scene.point(thing))))
            if thing.shape in _OUTLINED:
                found.append(Question(_ask("polygon", thing.name), _numbers(scene.outline(thing))))
    return tuple(found)


def _colour(rng: random.Random, split: Split) -> VisionExample:
    colour, shape = target = _kind(rng)
    scene = _scene(rng, split, target, lambda kind: kind[1] != shape)
    return _example(rng, "colour", scene, shape, colour, colour)


def _shape(rng: random.Random, split: Split) -> VisionExample:
    colour, shape = target = _kind(rng)
    scene = _scene(rng, split, target, lambda kind: kind[0] != colour)
    return _example(rng, "shape", scene, colour, shape, shape)


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
    what = _several(shape) if by_shape else f"{colour} objects"
    return _example(rng, "count", scene, what, str(count), count)


def _referred(rng: random.Random, split: Split, shapes: Sequence[str] = SHAPES) -> tuple[Scene, Thing]:
    """A scene and its one thing of some colour and shape."""
    target = _kind(rng, shapes)
    scene = _scene(rng, split, target, lambda kind: kind != target)
    return scene, next(thing for thing in scene.things if (thing.colour, thing.shape) == target)


def _box(rng: random.Random, split: Split) -> VisionExample:
    scene, thing = _referred(rng, split)
    gold = scene.box(thing)
    return _example(rng, "box", scene, thing.name, _numbers(gold), gold)


def _point(rng: random.Random, split: Split) -> VisionExample:
    scene, thing = _referred(rng, split)
    point = scene.point(thing)
    gold = {"point": point, "size": [scene.width, scene.height]}
    return _example(rng, "point", scene, thing.name, _numbers(point), gold)


def _polygon(rng: random.Random, split: Split) -> VisionExample:
    scene, thing = _referred(rng, split, _OUTLINED)
    gold = scene.outline(thing)
    return _example(rng, "polygon", scene, thing.name, _numbers(gold), gold)


# Charts, text, digits, clips


def _chart(rng: random.Random, split: Split) -> VisionExample:
    chart = sample_chart(rng, split)
    tallest, lowest = ("tallest bar?", "which bar is tallest?"), ("lowest bar?", "which bar is lowest?")
    heights = [
        Question((f"height of the {bar.colour} bar?", f"how tall is the {bar.colour} bar?"), str(bar.height))
        for bar in chart.bars
    ]
    questions = (Question(tallest, chart.tallest.colour), Question(lowest, chart.lowest.colour), *heights)
    kind = rng.randrange(4)
    if kind == 0:
        question, gold = rng.choice(tallest), chart.tallest.colour
    elif kind == 1:
        question, gold = rng.choice(lowest), chart.lowest.colour
    else:
        which = rng.randrange(len(chart.bars))
        question, gold = rng.choice(heights[which].wordings), chart.bars[which].height
    return VisionExample("chart", chart.render(rng), question, str(gold), gold, chart.caption(), questions)


def _ocr(rng: random.Random, split: Split) -> VisionExample:
    lettering = sample_lettering(rng, split)
    only = Question(("read the text", "what does it say?", "what is written?"), lettering.text)
    question = rng.choice(only.wordings)
    return VisionExample(
        "ocr", lettering.render(rng), question, only.answer, lettering.text, f"text {lettering.text}", (only,)
    )


def _digit(rng: random.Random, split: Split) -> VisionExample:
    digit = sample_digit(rng, split)
    only = Question(("which digit?", "what digit is this?", "read the digit"), str(digit.value))
    question = rng.choice(only.wordings)
    return VisionExample(
        "digit", digit.render(rng), question, only.answer, digit.value, f"digit {digit.value}", (only,)
    )


def _motion(rng: random.Random, split: Split) -> VisionExample:
    motion = sample_motion(rng, split)
    shape = motion.shape
    only = Question(
        (f"where does the {shape} move?", f"which way does the {shape} move?", "direction of motion?"), motion.direction
    )
    question = rng.choice(only.wordings)
    return VisionExample(
        "motion", motion.render(rng), question, only.answer, motion.direction, motion.caption(), (only,)
    )


def _event(rng: random.Random, split: Split) -> VisionExample:
    event = sample_event(rng, split)
    what = Question(("what happens?", f"what happens to the {event.shape}?"), event.kind)
    when = Question(("when does it happen?", "at which second does it happen?"), str(event.second))
    asked, gold = (what, event.kind) if rng.random() < 0.5 else (when, event.second)
    question = rng.choice(asked.wordings)
    return VisionExample("event", event.render(rng), question, asked.answer, gold, event.caption(), (what, when))


def _numbers(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


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


def chance(task: str, examples: Sequence[VisionExample]) -> float:
    """What a blind model would score on these examples of one task, at best.

    The better of answering with another example's answer and of the best constant answer (of the most frequent ones).
    Questions for a number and questions for a word are judged apart, because the question alone tells them.
    """
    family = VISION_TASKS[task]
    asks_number = [isinstance(example.gold, int) for example in examples]
    total = 0.0
    for form in sorted(set(asks_number)):
        alike = [example for example, number in zip(examples, asks_number, strict=True) if number == form]
        total += len(alike) * max(_borrowed(family, alike), _constant(family, alike))
    return total / len(examples)


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
