"""Who may call the engine next: fair between roles and episodes, and as much at once as the engine bears.

A permit covers one attempt of one engine call. Whoever holds it waits for the engine and for nothing else, so every
permit comes back; an agent that waits for tools, children, a judge or its next attempt holds none. So no tree of
agents, however deep, can deadlock, even on a single permit.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

_BACKED_OFF = 0.5


class Permits:
    """The role with the fewest calls running goes first; within a role episodes take turns; within an episode it is
    first come, first served.

    `limit` is halved when the engine refuses a call and grows by about one for every `limit` calls that succeed while
    others wait, up to what it was at first (additive increase, multiplicative decrease). Refusals of calls that had
    begun before a halving do not halve it again.
    """

    def __init__(self, limit: int, role_limits: Mapping[str, int] = MappingProxyType({})) -> None:
        """limit: calls at once at most. role_limits: the same for single roles."""
        self._most = limit
        self._allowed = float(limit)
        self._role_limits = role_limits
        self._queues: dict[str, OrderedDict[object, list[asyncio.Future[None]]]] = {}
        self._halvings = 0
        self._open = True
        self._idle = asyncio.Event()
        self.total = 0
        self.running = Counter[str]()
        self.waiting = Counter[str]()

    @property
    def limit(self) -> int:
        return int(self._allowed)

    def try_acquire(self, role: str) -> bool:
        """Takes a permit where one is free. Nobody is overtaken: who waits then waits for his role's limit."""
        if not self._open or self.total >= self.limit or self.running[role] >= self._limit_of(role):
            return False
        self._take(role)
        return True

    async def acquire(self, role: str, episode: object) -> None:
        """Waits for a permit; cancelled, it leaves none behind."""
        waiter = asyncio.get_running_loop().create_future()
        queue = self._queues.get(role)
        if queue is None:
            queue = self._queues[role] = OrderedDict()
        waiters = queue.get(episode)
        if waiters is None:
            queue[episode] = [waiter]
        else:
            waiters.append(waiter)
        self.waiting[role] += 1
        try:
            await waiter
        except asyncio.CancelledError:
            # Granted at the same moment, it must be handed on; otherwise the cancelled waiter is skipped when found.
            if waiter.cancelled():
                self.waiting[role] -= 1
            else:
                self.release(role)
            raise

    def release(self, role: str) -> None:
        self.total -= 1
        self.running[role] -= 1
        self._grant()
        if not self.total:
            self._idle.set()

    @property
    def halvings(self) -> int:
        """How often the limit was halved; a call keeps the number of its beginning for `refused`."""
        return self._halvings

    def succeeded(self) -> None:
        if self._allowed < self._most and self.waiting.total():
            self._allowed = min(self._most, self._allowed + 1 / self._allowed)

    def refused(self, begun: int) -> None:
        """The engine refused a call that began after `begun` halvings."""
        if begun == self._halvings:
            self._halvings += 1
            self._allowed = max(1.0, self._allowed * _BACKED_OFF)

    async def close(self) -> None:
        """Grants none from now on; returns when those granted have come back."""
        self._open = False
        while self.total:
            self._idle.clear()
            await self._idle.wait()

    def reopen(self) -> None:
        self._open = True
        self._grant()

    def _limit_of(self, role: str) -> int:
        return self._role_limits.get(role, self._most)

    def _take(self, role: str) -> None:
        self.total += 1
        self.running[role] += 1

    def _grant(self) -> None:
        while self._open and self.total < self.limit:
            able = [role for role, queue in self._queues.items() if queue and self.running[role] < self._limit_of(role)]
            if not able:
                return
            role = min(able, key=self.running.__getitem__)
            episode, waiters = self._queues[role].popitem(last=False)
            waiter = waiters.pop(0)
            if waiters:
                self._queues[role][episode] = waiters
            if not waiter.cancelled():
                self.waiting[role] -= 1
                self._take(role)
                waiter.set_result(None)
