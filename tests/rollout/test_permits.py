"""Order, fairness and adaptation of permits, against hand-worked schedules; time is simulated."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.agent.virtual import run_virtual
from baltoro.rollout.permits import Permits


def served(permits: Permits, calls: Sequence[tuple[str, str]], cancelled: Sequence[int] = ()) -> list[tuple[str, str]]:
    """Calls (role, episode) that arrive at once, each a second long (those let through first end first), in the order
    in which they are let through."""
    order: list[tuple[str, str]] = []

    async def call(role: str, episode: str) -> None:
        if not permits.try_acquire(role):
            await permits.acquire(role, episode)
        order.append((role, episode))
        try:
            await asyncio.sleep(1 + len(order) / 1000)
        finally:
            permits.release(role)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call(*names)) for names in calls]
            await asyncio.sleep(0.5)
            for index in cancelled:
                tasks[index].cancel()
        assert permits.total == permits.running.total() == permits.waiting.total() == 0

    run_virtual(main())
    return order


def test_episodes_take_turns_and_calls_of_one_episode_keep_their_order() -> None:
    order = served(Permits(1), [("a", "big")] * 4 + [("a", "small")] * 2)
    assert [episode for _, episode in order] == ["big", "big", "small", "big", "small", "big"]


def test_the_role_with_the_fewest_running_calls_is_next() -> None:
    order = served(Permits(2), [("child", f"{i}") for i in range(5)] + [("judge", "x"), ("judge", "y")])
    # Two children go at once. One ends: one child runs and no judge, so a judge is next; and so on while judges wait.
    assert [role for role, _ in order] == ["child", "child", "judge", "child", "judge", "child", "child"]


def test_a_role_at_its_limit_holds_nobody_else_up() -> None:
    permits = Permits(3, {"judge": 1})
    order = served(permits, [("judge", f"{i}") for i in range(3)] + [("a", "x"), ("a", "y"), ("a", "z")])
    assert [role for role, _ in order] == ["judge", "a", "a", "judge", "a", "judge"]


def test_cancelled_waiters_are_skipped() -> None:
    calls = [("a", f"{i}") for i in range(5)]
    assert [episode for _, episode in served(Permits(1), calls, cancelled=[1, 3])] == ["0", "2", "4"]


def test_a_permit_granted_to_a_task_that_is_cancelled_at_the_same_moment_is_handed_on() -> None:
    async def main() -> None:
        permits = Permits(1)
        assert permits.try_acquire("a")
        waiters = [asyncio.create_task(permits.acquire("a", i)) for i in range(2)]
        await asyncio.sleep(0)
        permits.release("a")
        waiters[0].cancel()
        await waiters[1]
        assert waiters[0].cancelled()
        assert permits.total == 1

    run_virtual(main())


@given(
    st.integers(1, 4),
    st.dictionaries(st.sampled_from("ab"), st.integers(1, 3)),
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 3), st.booleans()), max_size=30),
)
def test_the_limits_hold_and_everyone_is_served(
    limit: int, role_limits: dict[str, int], calls: list[tuple[str, str, int, bool]]
) -> None:
    permits = Permits(limit, role_limits)
    served = 0

    async def call(role: str, episode: str, begin: int) -> None:
        nonlocal served
        await asyncio.sleep(begin)
        if not permits.try_acquire(role):
            await permits.acquire(role, episode)
        assert permits.total <= limit
        assert all(permits.running[name] <= most for name, most in role_limits.items())
        try:
            await asyncio.sleep(1)
            served += 1
        finally:
            permits.release(role)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for role, episode, begin, cancelled in calls:
                task = group.create_task(call(role, episode, begin))
                if cancelled:
                    asyncio.get_running_loop().call_later(2.5, task.cancel)
        assert permits.total == permits.waiting.total() == 0

    run_virtual(main())
    assert served >= sum(not cancelled for *_, cancelled in calls)


def test_the_limit_is_halved_once_for_refusals_of_the_same_moment_and_grows_by_one_a_round() -> None:
    permits = Permits(64)
    begun = permits.halvings
    for _ in range(20):
        permits.refused(begun)
    assert permits.limit == 32
    permits.refused(permits.halvings)
    assert permits.limit == 16
    for _ in range(100):
        permits.succeeded()
    assert permits.limit == 16  # nobody waits: more would not be used

    async def main() -> None:
        while permits.try_acquire("a"):
            pass
        waiter = asyncio.create_task(permits.acquire("a", 0))
        await asyncio.sleep(0)
        for _ in range(17):
            permits.succeeded()
        assert permits.limit == 17
        for _ in range(3000):
            permits.succeeded()
        assert permits.limit == 64
        waiter.cancel()

    run_virtual(main())


def test_closing_waits_for_those_inside_and_lets_nobody_in() -> None:
    async def main() -> None:
        permits = Permits(2)
        assert permits.try_acquire("a")
        asyncio.get_running_loop().call_later(3, permits.release, "a")
        await permits.close()
        assert asyncio.get_running_loop().time() == pytest.approx(3)
        assert not permits.try_acquire("a")
        waiter = asyncio.create_task(permits.acquire("a", 0))
        await asyncio.sleep(10)
        assert not waiter.done()
        permits.reopen()
        await waiter

    run_virtual(main())
