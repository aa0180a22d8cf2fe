"""Counting reward from the absolute difference (report section 4.4.2, which gives no scale: ours is the target)."""


def count_score(predicted: int, target: int) -> float:
    """1 - |predicted - target| / max(target, 1), at least 0; so a negative prediction is 0. `target` >= 0."""
    return max(0.0, 1.0 - abs(predicted - target) / max(target, 1))
