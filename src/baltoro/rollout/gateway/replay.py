"""Clients ask again when an answer did not arrive. The second request gets the answer of the first, which is recorded
once.

Only what says that it is a repetition is treated as one: the clients of OpenAI and Anthropic count in the header
x-stainless-retry-count, others send one Idempotency-Key twice. Equal requests that say nothing are new ones, for an
agent may want several answers to one prompt.
"""

import asyncio
from collections import OrderedDict
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
        self._answers: OrderedDict[tuple[str, object], asyncio.Future[Told]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of the answers that are kept."""
        done = (one for one in self._answers.values() if one.done() and not one.cancelled())
        return sum(len(one.result().body) for one in done)

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
                if self._answers.get(key) is told:
                    del self._answers[key]
            done = [key for key, one in self._answers.items() if one.done()]
            for key in done[:-_KEPT]:
                del self._answers[key]


def _key(path: str, body: bytes, headers: Mapping[str, str]) -> tuple[str, object]:
    named = headers.get("Idempotency-Key")
    return path, named if named is not None else (len(body), hash(body))
