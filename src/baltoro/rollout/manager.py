"""The rollout manager: every episode is a coroutine of this process, and shares the engine with all others
(appendix D).

An episode may start sub-rollouts (subagents, judges) by running them on its own `Episode`; they need no slot of their
own. Waiting for one another is free, because only calls of the engine are bounded (see `permits`).
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from baltoro.agent.engine import Completion, Engine, Overloaded, Sampling
from baltoro.agent.loop import derive_seed
from baltoro.agent.trace import Status, Trace
from baltoro.chat.messages import TokenSequence
from baltoro.rollout.collector import collecting_rarely
from baltoro.rollout.permits import Permits

# The statuses of a trace, and: crashed: the rollout raised. timed out: it had worked for `episode_s`. cancelled: by its
# submitter or by the end of the manager. suspended: cut; submitted again it goes on from the journal.
Outcome = Status | Literal["crashed", "timed out", "cancelled", "suspended"]
OUTCOMES: tuple[Outcome, ...] = (*get_args(Status), "crashed", "timed out", "cancelled", "suspended")

_LONGEST_PAUSE_S = 60.0
# So many episodes begin at once; between them the loop goes on with what it has.
_AT_ONCE = 32


@dataclass(frozen=True)
class ManagerConfig:
    """live: episodes at once; `submit` waits for one of these places. calls: engine calls at once, of all episodes;
    role_calls: of one role. call_s: seconds for one attempt of an engine call, from when it is let through. episode_s:
    seconds that an episode may work; while a call of it waits to be let through, its clock stands still. retries: how
    often one call is repeated after an error of each kind; other errors end it. pause_s: before the first repetition;
    doubled by each, and drawn from the upper half of that."""

    live: int = 100_000
    calls: int = 1024
    role_calls: Mapping[str, int] = field(default_factory=dict[str, int])
    call_s: float | None = None
    episode_s: float | None = None
    retries: Mapping[type[Exception], int] = field(
        default_factory=lambda: {Overloaded: 10, ConnectionError: 3, TimeoutError: 1}
    )
    pause_s: float = 0.5


@dataclass(frozen=True, eq=False)
class Ended:
    """How an episode ended. trace: where the rollout returned one; error: what it raised."""

    episode: str
    outcome: Outcome
    trace: Trace | None = None
    error: Exception | None = None


class Episode:
    """The engine that the agents of one episode share: calls queue fairly, are bounded in time and repeated."""

    def __init__(self, id: str, manager: "RolloutManager") -> None:
        self.id = id
        self._manager = manager
        self._clock = _Clock(manager.config.episode_s)

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        """Raises what the engine raises, once no repetition is left."""
        config, stats = self._manager.config, self._manager.stats
        failures: dict[type[Exception], int] = {}
        while True:
            try:
                completion = await self._attempt(prompt, sampling, role)
            except tuple(config.retries) as error:
                kind = next(kind for kind in config.retries if isinstance(error, kind))
                stats.faults[kind.__name__] += 1
                failures[kind] = failures.get(kind, 0) + 1
                if failures[kind] > config.retries[kind]:
                    raise
                await asyncio.sleep(_pause_s(config.pause_s, sum(failures.values()), sampling.seed, error))
            else:
                stats.turns += 1
                stats.tokens += len(completion.ids)
                return completion

    async def _attempt(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        engine, permits, call_s = self._manager.engine, self._manager.permits, self._manager.config.call_s
        if not permits.try_acquire(role):
            with self._clock.stopped():
                await permits.acquire(role, self.id)
        begun = permits.halvings
        try:
            if call_s is None:
                completion = await engine.generate(prompt, sampling, role)
            else:
                async with asyncio.timeout(call_s):
                    completion = await engine.generate(prompt, sampling, role)
            permits.succeeded()
            return completion
        except Overloaded:
            permits.refused(begun)
            raise
        finally:
            permits.release(role)

    async def run(self, rollout: "Rollout") -> "Ended":
        """The boundary at which whatever happens to an episode becomes data."""
        try:
            async with self._clock.running():
                trace = await rollout(self)
        except asyncio.CancelledError:
            return Ended(self.id, "suspended" if self._manager.cutting else "cancelled")
        except Exception as error:
            return Ended(self.id, "timed out" if self._clock.expired else "crashed", error=error)
        return Ended(self.id, trace.status, trace)


Rollout = Callable[[Episode], Awaitable[Trace]]


class Running:
    """A submitted episode."""

    def __init__(self, id: str, task: asyncio.Task[Ended]) -> None:
        self.id = id
        self._task = task

    async def ended(self) -> Ended:
        """Waits for the end; raises nothing of what happened in the episode. Whoever waits may be cancelled, and the
        episode goes on."""
        await asyncio.wait([self._task])
        return _result(self.id, self._task)

    def cancel(self) -> None:
        """Ends the episode with the tools and the agents below it."""
        self._task.cancel()


@dataclass
class Stats:
    """Counts since the manager began. turns: engine calls that succeeded; tokens: drawn by them; faults: attempts that
    failed, by the kind of error; outcomes: of episodes that ended, so that submitted - outcomes.total() are live."""

    submitted: int = 0
    turns: int = 0
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter[str])
    outcomes: Counter[Outcome] = field(default_factory=Counter[Outcome])

    def episodes(self) -> dict[str, float]:
        return {
            "live": self.submitted - self.outcomes.total(),
            "submitted": self.submitted,
            **{f"outcomes_{outcome.replace(' ', '_')}": self.outcomes[outcome] for outcome in OUTCOMES},
        }


class RolloutManager:
    """Runs episodes on one engine. Every submitted episode ends in exactly one outcome."""

    def __init__(self, engine: Engine, config: ManagerConfig) -> None:
        self.engine = engine
        self.config = config
        self.permits = Permits(config.calls, config.role_calls)
        self.stats = Stats()
        self.cutting = False
        self._places = asyncio.Semaphore(config.live)
        self._started: set[asyncio.Task[Ended]] = set()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Episodes live within it: leaving it waits for all of them, leaving it by an exception cancels them."""
        with collecting_rarely():
            async with asyncio.TaskGroup() as self._group:
                yield

    async def submit(self, id: str, rollout: Rollout) -> Running:
        """Waits for a place, then starts the episode."""
        await self._places.acquire()
        self.stats.submitted += 1
        if self.stats.submitted % _AT_ONCE == 0:
            await asyncio.sleep(0)
        task = self._group.create_task(self._run(Episode(id, self), rollout))
        task.add_done_callback(lambda task: self._end(id, task))
        return Running(id, task)

    async def cut(self) -> None:
        """Lets the turns in flight end, then suspends every live episode: the boundary of an iteration."""
        await self.permits.close()
        self.cutting = True
        for task in self._started:
            task.cancel()
        if self._started:
            await asyncio.wait(self._started)
        self.cutting = False
        self.permits.reopen()

    def numbers(self) -> dict[str, float]:
        """What a monitor shows, by flat names: gauges (live, calls_limit, calls_running_ROLE, calls_waiting_ROLE) and
        counters (submitted, turns, tokens, faults_KIND, outcomes_OUTCOME)."""
        permits, stats = self.permits, self.stats
        return {
            **stats.episodes(),
            "turns": stats.turns,
            "tokens": stats.tokens,
            "calls_limit": permits.limit,
            **{f"calls_running_{role}": count for role, count in permits.running.items()},
            **{f"calls_waiting_{role}": count for role, count in permits.waiting.items()},
            **{f"faults_{kind}": count for kind, count in stats.faults.items()},
        }

    async def _run(self, episode: Episode, rollout: Rollout) -> Ended:
        task = asyncio.current_task()
        assert task
        self._started.add(task)  # only what has started can end as suspended
        return await episode.run(rollout)

    def _end(self, id: str, task: asyncio.Task[Ended]) -> None:
        self._started.discard(task)
        self._places.release()
        self.stats.outcomes[_result(id, task).outcome] += 1


def _result(id: str, task: asyncio.Task[Ended]) -> Ended:
    """A task that was cancelled before it started has no result."""
    return Ended(id, "cancelled") if task.cancelled() else task.result()


class _Clock:
    """The working time of an episode; it stands still while any call waits to be let through."""

    def __init__(self, seconds: float | None) -> None:
        self._left = seconds
        self._stops = 0

    def running(self) -> asyncio.Timeout:
        self._timeout = asyncio.timeout(self._left)
        return self._timeout

    @property
    def expired(self) -> bool:
        return self._timeout.expired()

    @contextlib.contextmanager
    def stopped(self) -> Generator[None]:
        if self._left is None or self.expired:
            yield
            return
        now = asyncio.get_running_loop().time
        if not self._stops:
            when = self._timeout.when()
            assert when is not None
            self._left = when - now()
            self._timeout.reschedule(None)
        self._stops += 1
        try:
            yield
        finally:
            self._stops -= 1
            if not self._stops:
                self._timeout.reschedule(now() + self._left)


def _pause_s(first: float, failures: int, seed: int, error: Exception) -> float:
    """Seeded, so that many that failed together come back apart, and every run alike."""
    longest = min(_LONGEST_PAUSE_S, first * 2 ** (failures - 1))
    asked = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return asked + longest * random.Random(derive_seed(seed, failures)).uniform(0.5, 1.0)
