"""Point reward: F1 with Gaussian-weighted distances under optimal assignment (report section 4.4.2)."""

import math
from collections.abc import Sequence

import numpy as np

from baltoro.score.grounding import soft_f1, solve_limit

Point = tuple[float, float]


def point_f1(
    predicted: Sequence[Point], target: Sequence[Point], size: tuple[float, float], sigma: float = 0.05
) -> float:
    """F1 whose matches weigh exp(-d^2 / (2 sigma^2)), d the distance in units of the image's diagonal.

    `size` is the image's width and height in the points' unit. The report does not give sigma; 0.05 is ours.
    A non-finite point matches nothing and counts as a prediction. Both empty is 1, one empty is 0.
    """
    usable = [point for point in predicted if all(map(math.isfinite, point))][: solve_limit(len(target))]
    distance = np.array([[math.dist(point, gold) for gold in target] for point in usable], dtype=np.float64)
    scaled = distance.reshape(len(usable), len(target)) / (math.hypot(*size) * sigma)
    return soft_f1(np.exp(-0.5 * scaled**2), len(predicted), len(target))
