"""The sessions in memory: all that are in use, and of the idle ones those that were used last."""

from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from baltoro.rollout.gateway.graph import Session
from baltoro.rollout.gateway.replay import Replays
from baltoro.rollout.gateway.store import Store


@dataclass(eq=False)
class Held:
    """size: bytes, as of the last time it was used."""

    session: Session
    replays: Replays = field(default_factory=Replays)
    size: int = 0


class Sessions:
    """Within `limit` bytes, roughly. What is idle beyond them is forgotten, answers for repetitions included, and
    loaded from `store` when it is used again."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._users = Counter[str]()
        self._size = 0

    def __len__(self) -> int:
        return len(self._held)

    @asynccontextmanager
    async def using(self, id: str) -> AsyncGenerator[Held]:
        """The one object of this session, for as long as anyone uses it: else two could number their calls alike."""
        self._users[id] += 1
        try:
            if id not in self._held:
                found = await self._store.load(id)
                self._held.setdefault(id, Held(found or Session(id)))
            self._held.move_to_end(id)
            yield self._held[id]
        finally:
            self._users[id] -= 1
            if not self._users[id]:
                del self._users[id]
            if id in self._held:
                self._measure(self._held[id])
            self._shrink()

    def _measure(self, held: Held) -> None:
        size = held.session.size + held.replays.size
        self._size += size - held.size
        held.size = size

    def _shrink(self) -> None:
        if self._size <= self._limit:
            return
        for id in [id for id in self._held if id not in self._users]:
            self._size -= self._held.pop(id).size
            if self._size <= self._limit:
                return
