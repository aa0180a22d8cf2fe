"""Clients ask again when an answer did not arrive. The second request gets the answer of the first, which is recorded
once.

Only what says that it is a repetition is treated as one: the clients of OpenAI and Anthropic count in the header
x-stainless-retry-count, others send one Idempotency-Key twice. Equal requests that say nothing are new ones, for an
agent may want several answers to one prompt.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

_KEPT = 16


@dataclass(frozen=True, eq=False)
class Told:
    """An answer as it was sent."""

    body: bytes
    kind: str


class Replays:
    """Of one session: the requests in flight, and the last that were answered."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, object], asyncio.Future[Told]] = {}
        self._done: deque[tuple[tuple[str, object], asyncio.Future[Told]]] = deque()
        self.size = 0
        """Bytes of the answers that are kept."""

    async def find(self, path: str, body: bytes, headers: Mapping[str, str]) -> Told | None:
        """What was answered to the request that this one repeats; waits where it is in flight. None: it is to be
        answered now, as new, or because the first attempt failed."""
        if headers.get("x-stainless-retry-count", "0") == "0" and "Idempotency-Key" not in headers:
            return None
        first = self._answers.get(_key(path, body, headers))
        if first is None:
            return None
        await asyncio.wait([first])
        return None if first.cancelled() else first.result()

    @asynccontextmanager
    async def answering(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator["asyncio.Future[Told]"]:
        """Gives the future that is to hold the answer; without one at the end, the attempt failed."""
        key = _key(path, body, headers)
        told = asyncio.get_running_loop().create_future()
        self._answers[key] = told
        try:
            yield told
        finally:
            if not told.done():
                told.cancel()
                self._forget(key, told)
            else:
                self._done.append((key, told))
                self.size += len(told.result().body)
                if len(self._done) > _KEPT:
                    oldest, told = self._done.popleft()
                    self.size -= len(told.result().body)
                    self._forget(oldest, told)

    def _forget(self, key: tuple[str, object], told: "asyncio.Future[Told]") -> None:
        if self._answers.get(key) is told:  # else the same was asked again since
            del self._answers[key]


def _key(path: str, body: bytes, headers: Mapping[str, str]) -> tuple[str, object]:
    named = headers.get("Idempotency-Key")
    return path, named if named is not None else (len(body), hash(body))
