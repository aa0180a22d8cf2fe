"""Scores of the visual families' answers, text against gold, in 0..1; text that does not parse scores 0."""

import re
from collections.abc import Sequence
from typing import cast

from baltoro.score.counting import count_score
from baltoro.score.grounding import Box, box_f1
from baltoro.score.points import Point, point_f1
from baltoro.score.polygons import polygon_iou
from baltoro.score.text import edit_similarity
from baltoro.world.scenes import GRID

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
