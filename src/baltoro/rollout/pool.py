"""Environment instances (sandboxes, browsers, desktops) that are made when somebody needs one, used by one at a time,
kept for the next, and never left behind (appendix D)."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


async def _well(instance: object) -> bool:
    return True


class Pool(Generic[T]):
    """At most `size` instances at once. Whoever needs one waits, first come, first served.

    An instance whose user failed or was cancelled is in a state that nobody knows: it is closed, and another is made
    when needed. So is one that was well used but is not `healthy` any more. No cancellation interrupts a `close`.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[T]],
        close: Callable[[T], Awaitable[None]],
        size: int,
        healthy: Callable[[T], Awaitable[bool]] = _well,
    ) -> None:
        self._make = make
        self._close = close
        self._healthy = healthy
        self._places = asyncio.Semaphore(size)
        self._idle: list[T] = []
        self._closing = set[asyncio.Task[None]]()
        self.in_use = 0
        self.not_closed: list[Exception] = []

    @property
    def idle(self) -> int:
        return len(self._idle)

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Leaving it closes every instance. What their `close` raised stands in `not_closed`, and harms nobody else."""
        async with asyncio.TaskGroup() as self._keepers:
            try:
                yield
            finally:
                assert not self.in_use, f"{self.in_use} instances are in use while their pool is closed"
                while self._idle:
                    self._retire(self._idle.pop())
                await _all_of(self._closing)

    @contextlib.asynccontextmanager
    async def instance(self) -> AsyncGenerator[T]:
        """One for the time within. Its place is free again when it is back or closed."""
        await self._places.acquire()
        try:
            instance = self._idle.pop() if self._idle else await self._make()
        except BaseException:
            self._places.release()
            raise
        self.in_use += 1
        kept = False
        try:
            yield instance
            kept = await self._healthy(instance)
        finally:
            self.in_use -= 1
            if kept:
                self._idle.append(instance)
                self._places.release()
            else:
                closing = self._retire(instance)
                closing.add_done_callback(lambda _: self._places.release())
                await _all_of({closing})

    def _retire(self, instance: T) -> asyncio.Task[None]:
        task = self._keepers.create_task(self._end(instance))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _end(self, instance: T) -> None:
        try:
            await self._close(instance)
        except Exception as error:  # the boundary: an instance that cannot be closed is counted
            self.not_closed.append(error)


async def _all_of(tasks: set[asyncio.Task[None]]) -> None:
    """Waits for them; being cancelled ends the waiting and not the tasks."""
    if tasks:
        await asyncio.wait(tasks)
