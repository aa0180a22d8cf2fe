"""The rollout manager spread over Ray actors (appendix D): each is a process with an engine and a `RolloutManager` of
its own, and this side only chooses actors and waits. Needs the package ray; `ray.init` is the caller's.

Ray lets 1000 calls of an actor run at once. So an episode is no call: one call starts it, and how it ended comes with
others over the one stream of its actor.

Rollouts cross as pickles: module-level functions, or frozen dataclasses with `__call__`. What ended comes back as a
pickle too, so that arrays in traces are the receiver's own and writable, rather than views of Ray's object store.
"""

import asyncio
import contextlib
import importlib
import itertools
import pickle
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baltoro.agent.engine import Engine
from baltoro.agent.trace import Trace
from baltoro.rollout.journal import Journal
from baltoro.rollout.manager import Ended, Episode, ManagerConfig, Running, Stats
from baltoro.rollout.manager import RolloutManager as Manager
from baltoro.rollout.partial import Resumable, resumable

# Ray has no types for the methods of actors.
ray: Any = importlib.import_module("ray")
_cloudpickle: Any = importlib.import_module("ray.cloudpickle")

_PERIOD_S = 0.5


class RayManager:
    """`RolloutManager`'s interface. An episode goes to the living actor with the fewest; when an actor dies, its
    episodes end as crashed with a ConnectionError, and the others go on without it.

    engine: picklable; called in every actor, it opens the engine there. config: of every actor, so `live` and `calls`
    are places and calls in each. journals: a folder on the actors' machines (not a network file system: SQLite), with a
    journal for every actor; rollouts then take a `Resumable`. An episode that an actor's journal has records of goes to
    that actor again and goes on there, also under a later manager of as many actors, if the actor of that number finds
    the same file. While its actor is dead it begins anew elsewhere.
    """

    def __init__(
        self,
        engine: Callable[[], AbstractAsyncContextManager[Engine]],
        config: ManagerConfig,
        actors: int,
        journals: Path | None = None,
    ) -> None:
        self.stats = Stats()
        self._engine = engine
        self._config = config
        self._count = actors
        self._journals = journals
        self._actors: list[_Remote] = []
        self._homes: dict[str, _Remote] = {}
        self._keys = itertools.count()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Episodes and actors live within it: leaving it waits for all episodes, leaving it by an exception cancels
        them. Raises what an actor raises that cannot open its engine or its journal."""
        make = ray.remote(_Actor).options(scheduling_strategy="SPREAD")
        self._actors, self._homes = [], {}
        try:
            for number in range(self._count):
                path = self._journals and self._journals / f"{number}.sqlite"
                self._actors.append(_Remote(number, make.remote(self._engine, self._config, path)))
            async with asyncio.TaskGroup() as services:
                for actor in self._actors:
                    services.create_task(self._serve(actor))
                for actor in self._actors:
                    await actor.open.wait()
                try:
                    async with asyncio.TaskGroup() as self._group:
                        yield
                finally:
                    for actor in self._actors:
                        actor.handle.close.remote()
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)

    async def submit(self, id: str, rollout: Callable[[Any], Awaitable[Trace]]) -> Running:
        """Waits for a place, and until the episode is in its actor. `rollout` takes an `Episode`, or with journals a
        `Resumable`. Raises ConnectionError when no actor is left."""
        packed = _cloudpickle.dumps(rollout)
        while (actor := self._choice(id)) is None:
            if not self._living():
                raise ConnectionError("all Ray actors of this manager have died; leave it and run another")
            self._changed.clear()
            await self._changed.wait()
        key = next(self._keys)
        actor.episodes[key] = asyncio.get_running_loop().create_future()
        self.stats.submitted += 1
        started = asyncio.Event()
        task = self._group.create_task(self._run(actor, key, id, packed, started))
        task.add_done_callback(lambda task: self._end(actor, key, id, started, task))
        await started.wait()
        return Running(id, task)

    async def cut(self) -> None:
        """Lets the turns in flight end, then suspends every live episode: the boundary of an iteration."""
        for cut in [actor.handle.cut.remote() for actor in self._living()]:
            with contextlib.suppress(ray.exceptions.RayActorError):
                await cut

    def numbers(self) -> dict[str, float]:
        """Those of `RolloutManager`, summed, and actors: how many live. Episodes are counted here; turns, faults and
        calls are what the actors last told, at most a second ago."""
        told = Counter[str]()
        for actor in self._actors:
            told.update(actor.numbers)
        return {**told, **self.stats.episodes(), "actors": len(self._living())}

    def _living(self) -> "list[_Remote]":
        return [actor for actor in self._actors if actor.alive]

    def _choice(self, id: str) -> "_Remote | None":
        """Who takes the episode, if he has a place."""
        home = self._homes.get(id)
        candidates = [home] if home and home.alive else self._living()
        best = min(candidates, key=lambda actor: len(actor.episodes), default=None)
        return best if best and len(best.episodes) < self._config.live else None

    async def _serve(self, actor: "_Remote") -> None:
        """Hears from an actor until it is closed. What breaks it once it was open is the end of that actor alone."""
        try:
            async for ref in actor.handle.serve.options(num_returns="streaming").remote():
                news: _News = await ref
                self._homes.update(dict.fromkeys(news.known, actor))
                actor.numbers = news.numbers
                for key, packed in news.ended:
                    actor.episodes[key].set_result(packed)
                actor.open.set()
        except ray.exceptions.RayError as error:
            if not actor.open.is_set():
                raise
            ray.kill(actor.handle)
            self._died(actor, error)

    async def _run(self, actor: "_Remote", key: int, id: str, packed: bytes, started: asyncio.Event) -> Ended:
        """Follows an episode. That it is cancelled is told to the actor, which says how it ends."""
        ending = actor.episodes[key]
        starting = asyncio.wrap_future(actor.handle.start.remote(key, id, packed).future())
        cancelled = False
        while not (starting.done() and ending.done()):
            try:
                await asyncio.wait([ending if starting.done() else starting])
            except asyncio.CancelledError:
                cancelled = True
            if starting.done():
                started.set()
                if cancelled:
                    actor.handle.cancel.remote(key)
                    cancelled = False
        with contextlib.suppress(ray.exceptions.RayError):
            starting.result()
        return _unpack(id, ending)

    def _end(self, actor: "_Remote", key: int, id: str, started: asyncio.Event, task: asyncio.Task[Ended]) -> None:
        outcome = "cancelled" if task.cancelled() else task.result().outcome
        self.stats.outcomes[outcome] += 1
        if self._journals and outcome == "suspended":
            self._homes[id] = actor
        del actor.episodes[key]
        started.set()
        self._changed.set()

    def _died(self, actor: "_Remote", error: Exception) -> None:
        actor.alive = False
        for ending in actor.episodes.values():
            if not ending.done():
                lost = ConnectionError(f"Ray actor {actor.number} died, and with it this episode")
                lost.__cause__ = error
                ending.set_exception(lost)
        actor.numbers = {name: n for name, n in actor.numbers.items() if name == "turns" or name.startswith("faults_")}
        self._changed.set()


@dataclass(frozen=True)
class _News:
    """What an actor tells. known: at first, the episodes that its journal has records of; ended: since the last."""

    known: list[str]
    numbers: dict[str, float]
    ended: list[tuple[int, bytes]]


class _Remote:
    """An actor as this side knows it. episodes: those it has, by key; results are packed."""

    def __init__(self, number: int, handle: Any) -> None:
        self.number = number
        self.handle = handle
        self.episodes: dict[int, asyncio.Future[bytes]] = {}
        self.alive = True
        self.open = asyncio.Event()
        self.numbers: Mapping[str, float] = {}


class _Actor:
    """In the actor's process. Episodes have a key here, since an id may come again."""

    def __init__(
        self,
        engine: Callable[[], AbstractAsyncContextManager[Engine]],
        config: ManagerConfig,
        path: Path | None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._path = path
        self._running: dict[int, Running] = {}
        self._ended: list[tuple[int, bytes]] = []
        self._news = asyncio.Event()
        self._closing = False

    async def serve(self) -> AsyncGenerator[_News]:
        """Opens everything and tells the news until it is closed."""
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(self._engine())
            self._journal = self._path and await stack.enter_async_context(Journal.open(self._path))
            self._manager = Manager(engine, self._config)
            await stack.enter_async_context(self._manager.run())
            self._group = await stack.enter_async_context(asyncio.TaskGroup())
            yield _News(list(self._journal.episodes) if self._journal else [], self._manager.numbers(), [])
            while not self._closing:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PERIOD_S):
                        await self._news.wait()
                self._news.clear()
                ended, self._ended = self._ended, []
                yield _News([], self._manager.numbers(), ended)

    async def start(self, key: int, id: str, packed: bytes) -> None:
        async def rollout(episode: Episode | Resumable) -> Trace:
            return await _cloudpickle.loads(packed)(episode)

        running = await self._manager.submit(id, resumable(self._journal, rollout) if self._journal else rollout)
        self._running[key] = running
        self._group.create_task(self._follow(key, running))

    async def _follow(self, key: int, running: Running) -> None:
        ended = await running.ended()
        del self._running[key]
        self._ended.append((key, _pack(ended)))
        self._news.set()

    async def cancel(self, key: int) -> None:
        if key in self._running:
            self._running[key].cancel()

    async def cut(self) -> None:
        await self._manager.cut()

    async def close(self) -> None:
        self._closing = True
        self._news.set()


def _pack(ended: Ended) -> bytes:
    """Errors carry their traceback as a note. One that is no pickle crosses as a RuntimeError with its text; a trace
    that is none has crashed."""
    error = ended.error
    try:
        if error:
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
            pickle.loads(_cloudpickle.dumps(error))
        return _cloudpickle.dumps(ended)
    except Exception as reason:
        told = traceback.format_exception_only(error or reason)
        outcome = ended.outcome if error else "crashed"
        return pickle.dumps(Ended(ended.episode, outcome, error=RuntimeError("".join(told))))


def _unpack(id: str, ending: asyncio.Future[bytes]) -> Ended:
    """Crashed, if its actor has died, or if what was packed there is nothing here."""
    try:
        return pickle.loads(ending.result())
    except Exception as error:
        return Ended(id, "crashed", error=error)
