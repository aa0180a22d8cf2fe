"""Episodes spread over real Ray actors: where they run, what crosses, and what a death takes with it."""

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baltoro.agent.engine import Completion, Overloaded, Sampling
from baltoro.agent.trace import Trace
from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.rollout.manager import Ended, Episode, ManagerConfig
from baltoro.rollout.partial import Resumable

ray: Any = pytest.importorskip("ray")

from baltoro.rollout.ray_actors import RayManager  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Generator[None]:
    # Actors cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100 << 20,
    )
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Process:
    """Says in which process it is. Role "sum": the sum of the prompt; role "held": never answers."""

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        if role == "held":
            await asyncio.sleep(1e9)
        if role == "refused":
            raise Overloaded(0.001)
        return Completion([os.getpid(), sum(prompt.ids)], [0.0, 0.0], "stop", 0)


@contextlib.asynccontextmanager
async def process() -> AsyncGenerator[Process]:
    yield Process()


@contextlib.asynccontextmanager
async def broken() -> AsyncGenerator[Process]:
    raise FileNotFoundError("weights")
    yield Process()


def trace(tokens: list[int], media: tuple[MediaItem, ...] = ()) -> Trace:
    return Trace("agent", (), tuple(tokens), (), (), media, (), "completed", "", True)


@dataclass(frozen=True)
class Ask:
    number: int
    role: str = "sum"

    async def __call__(self, episode: Episode | Resumable) -> Trace:
        said = await episode.generate(TokenSequence([self.number, 1]), Sampling(1), self.role)
        return trace(said.ids)


@dataclass(frozen=True)
class Hold:
    """Writes into a folder that it runs, then that it was ended."""

    folder: Path
    name: str

    async def __call__(self, episode: Episode | Resumable) -> Trace:
        (self.folder / f"{self.name}.pid").write_text(f"{os.getpid()}")
        try:
            await episode.generate(TokenSequence([1]), Sampling(1), "held")
        finally:
            (self.folder / f"{self.name}.ended").touch()
        return trace([])


def pid(ended: Ended) -> int:
    assert ended.trace is not None
    return ended.trace.tokens[0]


async def eventually(path: Path) -> None:
    while not path.exists() or (path.suffix == ".pid" and not path.read_text()):
        await asyncio.sleep(0.01)


async def test_episodes_are_spread_and_come_back() -> None:
    manager = RayManager(process, ManagerConfig(), 2)
    async with manager.run():
        running = [await manager.submit(f"{i}", Ask(i)) for i in range(40)]
        ended = [await each.ended() for each in running]
    assert [each.episode for each in ended] == [f"{i}" for i in range(40)]
    assert [each.trace.tokens[1] for each in ended if each.trace] == [i + 1 for i in range(40)]
    pids = Counter(map(pid, ended))
    assert len(pids) == 2
    assert os.getpid() not in pids
    numbers = manager.numbers()
    assert (numbers["submitted"], numbers["live"], numbers["outcomes_completed"], numbers["turns"]) == (40, 0, 40, 40)


async def test_an_actor_holds_more_episodes_than_ray_lets_it_have_calls() -> None:
    """1,200 live in one actor, and it still takes another one and cancels them all."""
    manager = RayManager(process, ManagerConfig(calls=1_300), 1)
    async with manager.run():
        held = await asyncio.gather(*[manager.submit(f"{i}", Ask(i, "held")) for i in range(1_200)])
        one_more = await manager.submit("sum", Ask(5))
        assert (await one_more.ended()).outcome == "completed"
        assert manager.numbers()["live"] == 1_200
        for each in held:
            each.cancel()
        assert Counter([(await each.ended()).outcome for each in held]) == {"cancelled": 1_200}


async def test_submit_waits_for_a_place_in_any_actor(tmp_path: Path) -> None:
    manager = RayManager(process, ManagerConfig(live=1), 2)
    async with manager.run():
        held = [await manager.submit(name, Hold(tmp_path, name)) for name in ("a", "b")]
        third = asyncio.ensure_future(manager.submit("c", Ask(1)))
        for name in ("a", "b"):
            await eventually(tmp_path / f"{name}.pid")
        pids = [int((tmp_path / f"{name}.pid").read_text()) for name in ("a", "b")]
        assert len(set(pids)) == 2
        assert not third.done()
        held[1].cancel()
        assert pid(await (await third).ended()) == pids[1]
        held[0].cancel()


async def test_cancellation_reaches_the_actor_and_leaving_by_an_error_cancels_all(tmp_path: Path) -> None:
    manager = RayManager(process, ManagerConfig(), 2)
    with pytest.raises(ExceptionGroup) as raised:
        async with manager.run():
            running = {name: await manager.submit(name, Hold(tmp_path, name)) for name in "abcd"}
            for name in running:
                await eventually(tmp_path / f"{name}.pid")
            waiter = asyncio.ensure_future(running["a"].ended())
            await asyncio.sleep(0)
            waiter.cancel()  # whoever waits may leave; the episode goes on
            await asyncio.wait([waiter])
            running["b"].cancel()
            assert (await running["b"].ended()).outcome == "cancelled"
            assert [path.stem for path in tmp_path.glob("*.ended")] == ["b"]
            raise KeyError("left")
    assert raised.group_contains(KeyError, match="left", depth=None)
    assert sorted(path.stem for path in tmp_path.glob("*.ended")) == list("abcd")
    assert manager.stats.outcomes == {"cancelled": 4}


async def test_a_death_ends_its_own_episodes_and_no_others(tmp_path: Path) -> None:
    manager = RayManager(process, ManagerConfig(live=2), 2)
    async with manager.run():
        held = {name: await manager.submit(name, Hold(tmp_path, name)) for name in "abcd"}
        for name in held:
            await eventually(tmp_path / f"{name}.pid")
        where = {name: int((tmp_path / f"{name}.pid").read_text()) for name in held}
        assert sorted(Counter(where.values()).values()) == [2, 2]
        os.kill(where["a"], signal.SIGKILL)
        lost = [name for name in held if where[name] == where["a"]]
        for name in lost:
            ended = await held[name].ended()
            assert ended.outcome == "crashed"
            assert isinstance(ended.error, ConnectionError)
            assert "died" in str(ended.error)
        numbers = manager.numbers()
        assert (numbers["actors"], numbers["outcomes_crashed"], numbers["live"]) == (1, 2, 2)
        (stays, goes) = set(held) - set(lost)
        held[goes].cancel()
        later = [await manager.submit(f"{i}", Ask(i)) for i in range(4)]
        assert {pid(await each.ended()) for each in later} == {where[stays]}

        assert not (tmp_path / f"{stays}.ended").exists()
        await manager.submit("last", Ask(1, "held"))
        waiting = asyncio.ensure_future(manager.submit("other", Ask(1)))
        await asyncio.sleep(0)
        os.kill(where[stays], signal.SIGKILL)
        with pytest.raises(ConnectionError, match="have died"):
            await waiting
    assert manager.stats.outcomes == {"crashed": 4, "completed": 4, "cancelled": 1}


async def test_an_actor_that_cannot_open_its_engine_says_why() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with RayManager(broken, ManagerConfig(), 2).run():
            raise AssertionError
    assert raised.group_contains(FileNotFoundError, match="weights")


class Stubborn(Exception):
    """Is no pickle."""

    def __init__(self) -> None:
        super().__init__("stubborn")
        self.lock = asyncio.get_running_loop()


async def stubborn(episode: Episode) -> Trace:
    raise Stubborn


async def unsendable(episode: Episode) -> Trace:
    return Trace("agent", (), (), (), (), (), (), "completed", "", True, signals={"x": asyncio.get_running_loop()})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]


async def seen(episode: Episode) -> Trace:
    patches = np.arange(2_000_000, dtype=np.float32).reshape(-1, 1)
    return trace([1], (MediaItem(patches, (1, 2, 3)),))


async def test_what_crosses() -> None:
    manager = RayManager(process, ManagerConfig(retries={}), 1)
    async with manager.run():
        rollouts = {"refused": Ask(1, "refused"), "stubborn": stubborn, "unsendable": unsendable, "seen": seen}
        ended = {name: await (await manager.submit(name, rollout)).ended() for name, rollout in rollouts.items()}
    assert [each.outcome for each in ended.values()] == ["crashed", "crashed", "crashed", "completed"]
    refused = ended["refused"].error
    assert isinstance(refused, Overloaded)
    assert refused.retry_after_s == 0.001
    assert "in generate" in refused.__notes__[0]
    assert "stubborn" in str(ended["stubborn"].error)
    assert "pickle" in str(ended["unsendable"].error)
    assert ended["seen"].trace is not None
    patches = ended["seen"].trace.media[0].patches
    assert patches.dtype == np.float32
    assert np.array_equal(patches.ravel(), np.arange(2_000_000))
    assert patches.flags.writeable


@dataclass(frozen=True)
class TwoTurns:
    """Its second turn is held as long as there is no file `go`. Writes down which process answered the first."""

    folder: Path

    async def __call__(self, episode: Resumable) -> Trace:
        first = await episode.generate(TokenSequence([20, 1]), Sampling(1), "sum")
        (self.folder / f"{episode.id}.pid").write_text(f"{first.ids[0]}")
        while not (self.folder / "go").exists():
            await asyncio.sleep(0.01)
        second = await episode.generate(TokenSequence([30, 1]), Sampling(1, seed=1), "sum")
        return trace([first.ids[0], second.ids[0], first.ids[1] + second.ids[1]])


NAMES = [f"{i}" for i in range(16)]


async def test_cut_episodes_go_on_in_their_actor_and_in_a_later_one_from_its_journal(tmp_path: Path) -> None:
    """Sixteen, cut after their first turn. Half go on at once, in another order: both turns are of one process. Half go
    on later: the first turn is as a process gave it that is gone, which has one successor."""
    manager = RayManager(process, ManagerConfig(), 2, tmp_path)

    async def go_on(names: list[str]) -> set[tuple[int, int]]:
        """Where the first turns were drawn, and where the second."""
        running = [await manager.submit(name, TwoTurns(tmp_path)) for name in reversed(names)]
        traces = [ended.trace for ended in [await each.ended() for each in running] if ended.trace]
        assert [each.tokens[2] for each in traces] == [21 + 31] * 8
        assert [each.tokens[0] for each in traces] == [answered[name] for name in reversed(names)]
        return {(each.tokens[0], each.tokens[1]) for each in traces}

    async with manager.run():
        running = [await manager.submit(name, TwoTurns(tmp_path)) for name in NAMES]
        for name in NAMES:
            await eventually(tmp_path / f"{name}.pid")
        await manager.cut()
        assert Counter([(await each.ended()).outcome for each in running]) == {"suspended": 16}
        answered = {name: int((tmp_path / f"{name}.pid").read_text()) for name in NAMES}
        (tmp_path / "go").touch()
        at_once = await go_on(NAMES[:8])
    async with manager.run():
        later = await go_on(NAMES[8:])
    former = {first for first, _ in at_once}
    assert at_once == {(each, each) for each in former}
    assert len(former) == len(later) == len({second for _, second in later}) == 2
    assert {first for first, _ in later} == former
    assert not former & {second for _, second in later}


def test_an_overloaded_engine_is_a_pickle() -> None:
    error = pickle.loads(pickle.dumps(Overloaded(3.5)))
    assert (error.retry_after_s, str(error)) == (3.5, str(Overloaded(3.5)))
