"""Warm-up, stable, decay (WSD): the K2 schedule."""

import math


def wsd(step: int, total: int, warmup: int, decay: int, floor: float = 0.1) -> float:
    """Factor on the peak learning rate at `step` in [0, total): linear warm-up over `warmup` steps, constant, then
    cosine to `floor` over the last `decay` steps."""
    if step < warmup:
        return (step + 1) / warmup
    left = total - step
    if left > decay:
        return 1.0
    progress = 1 - left / decay
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
