"""Grounding reward: F1 with soft IoU matches under optimal assignment (report section 4.4.2, "soft matching")."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in any unit that both sides share; x1 > x0 and y1 > y0, edges without thickness."""

_assign = cast(
    Callable[..., tuple[NDArray[np.intp], NDArray[np.intp]]],
    optimize.linear_sum_assignment,  # pyright: ignore[reportUnknownMemberType]
)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two well-formed boxes, in 0..1. Works in [0, 1] units as in pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def box_f1(predicted: Sequence[Box], target: Sequence[Box]) -> float:
    """F1 whose true positives are the IoUs of the best one-to-one matching.

    A malformed predicted box matches nothing and still counts as a prediction, as does every duplicate.
    Both empty is 1, one empty is 0.
    """
    usable = [box for box in predicted if is_box(box)][: solve_limit(len(target))]
    similarity = np.array([[iou(box, gold) for gold in target] for box in usable], dtype=np.float64)
    return soft_f1(similarity.reshape(len(usable), len(target)), len(predicted), len(target))


def is_box(box: Box) -> bool:
    return all(map(math.isfinite, box)) and box[2] > box[0] and box[3] > box[1]


def solve_limit(targets: int) -> int:
    """How many predictions enter the cubic-time assignment; those beyond only lower the precision."""
    return 4 * targets + 16


def soft_f1(similarity: NDArray[np.float64], predictions: int, targets: int) -> float:
    """2 TP / (predictions + targets), TP the weight of the best assignment in similarity [usable, targets] of 0..1.

    `predictions` may exceed the rows: predictions that cannot match cost precision all the same.
    """
    if predictions == 0 and targets == 0:
        return 1.0
    matched = _assign(similarity, maximize=True)
    return 2.0 * float(similarity[matched].sum()) / (predictions + targets)
