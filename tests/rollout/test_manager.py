"""Episodes under the manager: trees on one permit, outcomes, clocks, repetition, cancellation. Time is simulated."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.agent.engine import Completion, Overloaded, Sampling
from baltoro.agent.trace import Status, Trace
from baltoro.agent.virtual import run_virtual
from baltoro.chat.messages import TokenSequence
from baltoro.rollout.manager import Ended, Episode, ManagerConfig, Rollout, RolloutManager

Answer = Callable[[TokenSequence, Sampling, str], Awaitable[None]]
DONE = Completion([1], [0.0], "stop", 0)


class Second:
    """Takes a second for everything, unless `answer` says otherwise; knows how many calls it had at once."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer
        self.calls = self.now = self.most = 0

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.answer:
                await self.answer(prompt, sampling, role)
            else:
                await asyncio.sleep(1)
        finally:
            self.now -= 1
        return DONE


def trace(status: Status = "completed", *children: Trace) -> Trace:
    return Trace("agent", (), (), (), (), (), (), status, "", True)


async def ask(episode: Episode, role: str = "agent", seed: int = 0) -> Completion:
    return await episode.generate(TokenSequence([1]), Sampling(1, seed=seed), role)


async def one_turn(episode: Episode) -> Trace:
    await ask(episode)
    return trace()


def run(engine: Second, config: ManagerConfig, rollouts: Sequence[Rollout]) -> tuple[list[Ended], RolloutManager]:
    async def main() -> tuple[list[Ended], RolloutManager]:
        manager = RolloutManager(engine, config)
        async with manager.run():
            running = [await manager.submit(f"{i}", rollout) for i, rollout in enumerate(rollouts)]
            ended = [await each.ended() for each in running]
        assert manager.permits.total == manager.permits.waiting.total() == 0
        assert manager.stats.submitted == manager.stats.outcomes.total() == len(rollouts)
        return ended, manager

    return run_virtual(main())


def outcomes(ended: Sequence[Ended]) -> list[str]:
    return [each.outcome for each in ended]


Tree = tuple[str, list["Tree"]]
trees = st.recursive(
    st.tuples(st.sampled_from(["agent", "judge"]), st.builds(list)),
    lambda below: st.tuples(st.sampled_from(["agent", "judge"]), st.lists(below, max_size=4)),
    max_leaves=25,
)


@given(st.lists(trees, min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 2))
def test_no_tree_of_agents_deadlocks(forest: list[Tree], calls: int, judges: int) -> None:
    """Every agent speaks, waits for its children (all at once), and speaks again. A simulated loop raises Deadlock."""

    async def agent(episode: Episode, tree: Tree) -> int:
        role, below = tree
        await ask(episode, role)
        async with asyncio.TaskGroup() as group:
            children = [group.create_task(agent(episode, child)) for child in below]
        await ask(episode, role)
        return 2 + sum(child.result() for child in children)

    def rollout(tree: Tree) -> Rollout:
        async def whole(episode: Episode) -> Trace:
            nonlocal turns
            taken = await agent(episode, tree)
            turns += taken
            return trace()

        return whole

    turns = 0
    engine = Second()
    ended, manager = run(engine, ManagerConfig(calls=calls, role_calls={"judge": judges}), [rollout(t) for t in forest])
    assert outcomes(ended) == ["completed"] * len(forest)
    assert engine.calls == manager.stats.turns == turns
    assert engine.most <= calls


def test_every_way_to_end_is_one_outcome() -> None:
    async def returns(status: Status) -> Trace:
        return trace(status)

    async def raises(episode: Episode) -> Trace:
        raise KeyError("x")

    async def works(episode: Episode) -> Trace:
        await asyncio.sleep(100)
        return trace()

    rollouts: list[Rollout] = [lambda e: returns("limit"), lambda e: returns("overflow"), lambda e: returns("failed")]
    ended, _ = run(Second(), ManagerConfig(episode_s=10), [one_turn, *rollouts, raises, works])
    assert outcomes(ended) == ["completed", "limit", "overflow", "failed", "crashed", "timed out"]
    assert isinstance(ended[4].error, KeyError)


def test_numbers_by_hand() -> None:
    """Three agents and a judge on two permits, looked at in the middle of the first second, of the third, and after."""

    async def refuse(prompt: TokenSequence, sampling: Sampling, role: str) -> None:
        await asyncio.sleep(1)
        if role == "judge":
            raise KeyError("no judge")

    async def judged(episode: Episode) -> Trace:
        await ask(episode, "judge")
        return trace()

    async def limited(episode: Episode) -> Trace:
        await ask(episode)
        return trace("limit")

    async def main() -> list[dict[str, float]]:
        manager = RolloutManager(Second(refuse), ManagerConfig(calls=2, retries={KeyError: 0}))
        async with manager.run():
            for number, rollout in enumerate((one_turn, limited, one_turn, judged)):
                await manager.submit(f"{number}", rollout)
            await asyncio.sleep(0.5)
            seen = [manager.numbers()]
            await asyncio.sleep(1)
            seen.append(manager.numbers())
        return [{name: value for name, value in each.items() if value} for each in (*seen, manager.numbers())]

    first, second, last = run_virtual(main())
    assert first == {"live": 4, "submitted": 4, "calls_limit": 2, "calls_running_agent": 2} | {
        "calls_waiting_agent": 1, "calls_waiting_judge": 1,
    }  # fmt: skip
    half = {"submitted": 4, "turns": 2, "tokens": 2, "outcomes_completed": 1, "outcomes_limit": 1, "calls_limit": 2}
    assert second == half | {"live": 2, "calls_running_agent": 1, "calls_running_judge": 1}
    assert last == half | {
        "turns": 3,
        "tokens": 3,
        "outcomes_completed": 2,
        "outcomes_crashed": 1,
        "faults_KeyError": 1,
    }


def test_submit_waits_for_a_place() -> None:
    async def main() -> None:
        manager = RolloutManager(Second(), ManagerConfig(live=2))
        async with manager.run():
            clock = asyncio.get_running_loop().time
            begun: list[float] = []
            for i in range(5):
                await manager.submit(f"{i}", one_turn)
                begun.append(clock())
        assert begun == [0, 0, 1, 1, 2]

    run_virtual(main())


def test_clocks_stand_still_in_the_queue() -> None:
    """Ten episodes of one second on one permit: the last waits for nine, and neither limit of two seconds is passed."""
    ended, _ = run(Second(), ManagerConfig(calls=1, call_s=2, episode_s=2), [one_turn] * 10)
    assert outcomes(ended) == ["completed"] * 10


def test_the_clock_goes_on_where_it_stood() -> None:
    async def two_turns(episode: Episode) -> Trace:
        await ask(episode)
        await asyncio.sleep(5)
        await ask(episode)
        return trace()

    # One second, five of waiting for a tool, one second: seven of work, whatever the queue adds.
    assert outcomes(run(Second(), ManagerConfig(calls=1, episode_s=7.5), [two_turns] * 8)[0]) == ["completed"] * 8
    assert outcomes(run(Second(), ManagerConfig(calls=1, episode_s=6.5), [two_turns] * 8)[0]) == ["timed out"] * 8


@pytest.mark.parametrize(
    ("error", "failures", "calls", "outcome"),
    [
        (Overloaded(7.0), 4, 5, "completed"),
        (ConnectionResetError(), 2, 3, "completed"),
        (ConnectionResetError(), 9, 4, "crashed"),
        (TimeoutError(), 9, 2, "crashed"),
        (ValueError(), 9, 1, "crashed"),
    ],
)
def test_errors_are_repeated_by_their_kind(error: Exception, failures: int, calls: int, outcome: str) -> None:
    left = failures

    async def answer(prompt: TokenSequence, sampling: Sampling, role: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise error

    engine = Second(answer)
    ended, manager = run(engine, ManagerConfig(), [one_turn])
    assert (engine.calls, ended[0].outcome) == (calls, outcome)
    assert manager.stats.faults.total() == (0 if isinstance(error, ValueError) else min(failures, calls))


def test_an_engine_that_asks_to_be_left_alone_is() -> None:
    times: list[float] = []

    async def answer(prompt: TokenSequence, sampling: Sampling, role: str) -> None:
        times.append(asyncio.get_running_loop().time())
        if len(times) < 3:
            raise Overloaded(10)

    run(Second(answer), ManagerConfig(pause_s=1), [one_turn])
    assert 10.5 <= times[1] <= 11
    assert 11 <= times[2] - times[1] <= 12


def test_a_call_that_hangs_holds_its_permit_no_longer_than_its_time() -> None:
    async def answer(prompt: TokenSequence, sampling: Sampling, role: str) -> None:
        await asyncio.sleep(1e9 if role == "stuck" else 1)

    async def family(episode: Episode) -> Trace:
        async with asyncio.TaskGroup() as group:
            stuck = group.create_task(failing(episode))
            for _ in range(20):
                group.create_task(ask(episode))
        assert await stuck == "TimeoutError"
        return trace()

    async def failing(episode: Episode) -> str:
        try:
            await ask(episode, "stuck")
        except TimeoutError as error:
            return type(error).__name__
        return ""

    engine = Second(answer)
    ended, _ = run(engine, ManagerConfig(calls=2, call_s=30), [family])
    assert outcomes(ended) == ["completed"]
    assert engine.now == 0


def test_the_limit_settles_at_what_the_engine_bears() -> None:
    """An engine that refuses whatever exceeds eight calls at once: everything ends, and few calls are refused."""
    running = refused = 0

    async def answer(prompt: TokenSequence, sampling: Sampling, role: str) -> None:
        nonlocal running, refused
        if running == 8:
            refused += 1
            raise Overloaded(1.0)
        running += 1
        await asyncio.sleep(1)
        running -= 1

    async def turns(episode: Episode) -> Trace:
        for seed in range(5):
            await ask(episode, seed=seed)
        return trace()

    ended, manager = run(Second(answer), ManagerConfig(calls=128), [turns] * 200)
    assert outcomes(ended) == ["completed"] * 200
    assert refused < 250  # of 1,000 turns; the first 120 are refused at once
    assert manager.permits.limit >= 4


def test_cancellation_reaches_what_the_episode_waits_for() -> None:
    released: list[str] = []

    async def holds(episode: Episode) -> Trace:
        async def tool(name: str) -> None:
            try:
                await asyncio.sleep(1e9)
            finally:
                released.append(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(tool("sandbox"))
            group.create_task(tool("socket"))
        return trace()

    async def main() -> None:
        manager = RolloutManager(Second(), ManagerConfig())
        async with manager.run():
            first = await manager.submit("first", holds)
            never_started = await manager.submit("second", holds)
            never_started.cancel()
            await asyncio.sleep(1)
            waiter = asyncio.create_task(first.ended())
            await asyncio.sleep(0)
            waiter.cancel()  # whoever waits may leave; the episode goes on
            await asyncio.sleep(1)
            assert not released
            first.cancel()
            assert [(await each.ended()).outcome for each in (first, never_started)] == ["cancelled"] * 2
        assert sorted(released) == ["sandbox", "socket"]
        assert manager.stats.outcomes == {"cancelled": 2}

    run_virtual(main())


def test_leaving_the_manager_by_an_error_cancels_and_accounts_for_every_episode() -> None:
    async def main() -> None:
        manager = RolloutManager(Second(), ManagerConfig(calls=1))
        with pytest.raises(ExceptionGroup, match="unhandled"):
            async with manager.run():
                for i in range(5):
                    await manager.submit(f"{i}", one_turn)
                await asyncio.sleep(2.5)
                raise ValueError
        assert manager.stats.outcomes == {"completed": 2, "cancelled": 3}
        assert manager.permits.total == manager.permits.waiting.total() == 0

    run_virtual(main())


def test_cut_lets_the_turns_in_flight_end_and_suspends_the_rest() -> None:
    """Two permits: at 0.5 two episodes are in their turn, one waits. The cut comes back when those turns end, at 1."""
    finished: list[str] = []

    async def two_turns(episode: Episode) -> Trace:
        await ask(episode)
        finished.append(episode.id)
        await ask(episode)
        return trace()

    async def main() -> None:
        manager = RolloutManager(Second(), ManagerConfig(calls=2))
        async with manager.run():
            running = [await manager.submit(f"{i}", two_turns) for i in range(3)]
            await asyncio.sleep(0.5)
            await manager.cut()
            assert asyncio.get_running_loop().time() == 1
            assert sorted(finished) == ["0", "1"]
            assert [(await each.ended()).outcome for each in running] == ["suspended"] * 3
            again = await manager.submit("3", two_turns)
            assert (await again.ended()).outcome == "completed"

    run_virtual(main())
