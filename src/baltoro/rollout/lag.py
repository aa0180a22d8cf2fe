"""How late the event loop is: what blocks it, blocks every episode of the process (appendix D, monitoring)."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator

_INTERVAL_S = 0.05
_KEPT = 1200  # the last minute


class LoopLag:
    """Seconds by which timers were late, over the last minute of `watch`."""

    def __init__(self) -> None:
        self._late: deque[float] = deque(maxlen=_KEPT)

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncGenerator[None]:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self._watch())
            try:
                yield
            finally:
                watcher.cancel()

    async def _watch(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due = now() + _INTERVAL_S
            await asyncio.sleep(_INTERVAL_S)
            self._late.append(now() - due)

    def quantile(self, share: float) -> float:
        """The lateness that this share of the timers did not exceed; 0 before the first."""
        late = sorted(self._late)
        return late[min(int(len(late) * share), len(late) - 1)] if late else 0.0

    def numbers(self) -> dict[str, float]:
        return {"lag_p50_s": self.quantile(0.5), "lag_p99_s": self.quantile(0.99)}
