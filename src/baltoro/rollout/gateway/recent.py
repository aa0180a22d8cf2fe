"""What was used last, within a bound."""

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by name, whose sizes together stay within `limit`; the one that was kept longest ago goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self._held = 0

    def get(self, name: str) -> V | None:
        return self._kept[name][0] if name in self._kept else None

    def keep(self, name: str, value: V, size: int) -> None:
        if name in self._kept:
            self._held -= self._kept.pop(name)[1]
        self._kept[name] = value, size
        self._held += size
        while self._held > self._limit:
            self._held -= self._kept.popitem(last=False)[1][1]
