"""Instances under every way to use them: none is left behind, none is shared. Time is simulated."""

import asyncio
from collections.abc import Coroutine

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.agent.virtual import run_virtual
from baltoro.rollout.pool import Pool


class Sandboxes:
    """Takes a second to make or close one; knows which are open."""

    def __init__(self, size: int, failing: frozenset[int] = frozenset()) -> None:
        self.open = set[int]()
        self.most = self.made = 0
        self.sick = set[int]()
        self.failing = failing
        self.pool = Pool(self.make, self.close, size, self.healthy)

    async def make(self) -> int:
        self.made += 1
        number = self.made
        await asyncio.sleep(1)
        if number in self.failing:
            raise OSError("no room")
        self.open.add(number)
        self.most = max(self.most, len(self.open))
        return number

    async def close(self, number: int) -> None:
        await asyncio.sleep(1)
        self.open.remove(number)
        if number % 7 == 0:
            raise OSError("it did not go quietly")

    async def healthy(self, number: int) -> bool:
        return number not in self.sick


uses = st.sampled_from(["works", "fails", "sickens", "is cancelled"])


@given(st.lists(st.tuples(uses, st.integers(0, 9), st.integers(0, 5)), max_size=30), st.integers(1, 4))
def test_no_instance_is_left_behind_or_shared(plan: list[tuple[str, int, int]], size: int) -> None:
    """Users come after so many seconds and stay for so many; cancellations fall anywhere, some into a close."""
    sandboxes = Sandboxes(size, frozenset({3, 5}))
    using = set[int]()
    served = 0

    async def user(use: str, comes: int, stays: int) -> None:
        nonlocal served
        await asyncio.sleep(comes)
        async with sandboxes.pool.instance() as number:
            assert number not in using
            using.add(number)
            try:
                await asyncio.sleep(stays)
                served += 1
                if use == "fails":
                    raise ValueError
                if use == "sickens":
                    sandboxes.sick.add(number)
            finally:
                using.remove(number)

    async def main() -> None:
        async with sandboxes.pool.run():
            tasks = [asyncio.create_task(user(*each)) for each in plan]
            for (use, comes, stays), task in zip(plan, tasks, strict=True):
                if use == "is cancelled":
                    for moment in (comes + stays / 2 + 0.5, comes + stays / 2 + 1):
                        asyncio.get_running_loop().call_later(moment, task.cancel)
            await asyncio.gather(*tasks, return_exceptions=True)
            assert sandboxes.pool.in_use == 0
            assert sandboxes.pool.idle <= len(sandboxes.open) <= size
            lost = sum(isinstance(t.exception(), OSError) for t in tasks if not t.cancelled())
            cancelled = sum(task.cancelled() for task in tasks)
            assert served >= len(plan) - lost - cancelled
        assert not sandboxes.open
        assert sandboxes.most <= size

    run_virtual(main())


def together(*users: Coroutine[None, None, None]) -> Coroutine[None, None, None]:
    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for each in users:
                group.create_task(each)

    return main()


def test_an_instance_is_used_again_unless_it_is_sick() -> None:
    sandboxes = Sandboxes(1)
    got: list[int] = []

    async def main() -> None:
        async with sandboxes.pool.run():
            for turn in range(4):
                async with sandboxes.pool.instance() as number:
                    got.append(number)
                    if turn == 1:
                        sandboxes.sick.add(number)

    run_virtual(main())
    assert got == [1, 1, 2, 2]
    assert not sandboxes.open


def test_an_instance_whose_user_failed_is_not_used_again() -> None:
    sandboxes = Sandboxes(1)

    async def main() -> None:
        async with sandboxes.pool.run():
            with pytest.raises(KeyError):
                async with sandboxes.pool.instance():
                    raise KeyError
            assert not sandboxes.open
            async with sandboxes.pool.instance() as number:
                assert number == 2

    run_virtual(main())


def test_a_pool_that_is_left_by_an_error_closes_what_is_idle() -> None:
    sandboxes = Sandboxes(1)

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            async with sandboxes.pool.run():
                async with sandboxes.pool.instance():
                    pass
                raise KeyError
        assert not sandboxes.open

    run_virtual(main())


def test_who_cannot_be_given_one_leaves_his_place_to_the_next() -> None:
    sandboxes = Sandboxes(1, frozenset({1}))

    async def main() -> None:
        async with sandboxes.pool.run():
            with pytest.raises(OSError, match="no room"):
                async with sandboxes.pool.instance():
                    raise AssertionError
            async with sandboxes.pool.instance() as number:
                assert number == 2

    run_virtual(main())


def test_instances_are_closed_when_what_uses_them_is_cancelled() -> None:
    sandboxes = Sandboxes(3)

    async def forever() -> None:
        async with sandboxes.pool.instance():
            await asyncio.sleep(1e9)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5), sandboxes.pool.run():
                await together(forever(), forever(), forever(), forever())
        assert sandboxes.made == 3
        assert not sandboxes.open

    run_virtual(main())
