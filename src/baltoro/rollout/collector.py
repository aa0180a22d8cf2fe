"""Python's collector of cyclic garbage, where thousands of objects come to stay."""

import gc
from collections.abc import Generator
from contextlib import contextmanager

# At Python's 700, a third of the time of 10,000 live episodes (bench/rollouts.py) and a fifth of a gateway's request
# (bench/gateway.py) goes into walking through what is no garbage.
_YOUNG = 20_000


@contextmanager
def collecting_rarely() -> Generator[None]:
    """So many new objects before it looks for cycles."""
    thresholds = gc.get_threshold()
    gc.set_threshold(_YOUNG, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
