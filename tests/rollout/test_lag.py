"""Lateness on a clock that stands still but for what blocks the loop."""

import asyncio
from typing import cast

from baltoro.agent.virtual import VirtualTimeLoop, run_virtual
from baltoro.rollout.lag import LoopLag


def test_a_blocked_loop_is_seen() -> None:
    """Of 100 timers, 3 are made late by 0.2 seconds, because something holds the loop while they fall due."""

    async def main() -> None:
        lag = LoopLag()
        assert lag.numbers() == {"lag_p50_s": 0.0, "lag_p99_s": 0.0}
        loop = cast(VirtualTimeLoop, asyncio.get_running_loop())
        async with lag.watch():
            for _ in range(3):
                await asyncio.sleep(1.51)
                loop.jump(0.24)
            await asyncio.sleep(0.2)
        assert lag.quantile(0.5) < 1e-9
        assert lag.quantile(0.9) < 1e-9
        assert 0.15 < lag.numbers()["lag_p99_s"] < 0.25

    run_virtual(main())
