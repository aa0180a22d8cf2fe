"""A running manager, watched in the terminal: `async with manager.run(), watched(manager, Console()): ...`"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from baltoro.rollout.lag import LoopLag
from baltoro.rollout.manager import RolloutManager

_PERIOD_S = 0.5


@asynccontextmanager
async def watched(manager: RolloutManager, console: Console) -> AsyncGenerator[None]:
    """Shows the manager's numbers and the loop's lag while the block runs, and once more at its end."""
    lag = LoopLag()

    def numbers() -> dict[str, float]:
        return {**manager.numbers(), **lag.numbers()}

    async def refresh() -> None:
        before = numbers()
        while True:
            await asyncio.sleep(_PERIOD_S)
            now = numbers()
            live.update(table(now, before), refresh=True)
            before = now

    with Live(console=console, auto_refresh=False) as live:
        async with lag.watch(), asyncio.TaskGroup() as group:
            refreshing = group.create_task(refresh())
            try:
                yield
            finally:
                refreshing.cancel()
                last = numbers()
                live.update(table(last, last), refresh=True)


def table(now: Mapping[str, float], before: Mapping[str, float]) -> Table:
    """Numbers that are not 0, and by how much they grew in a second since `before`."""
    shown = Table(title="rollouts")
    shown.add_column("")
    shown.add_column("now", justify="right")
    shown.add_column("a second", justify="right")
    for name, value in now.items():
        grown = (value - before.get(name, 0.0)) / _PERIOD_S
        seconds = name.endswith("_s")
        if value or grown:
            text = f"{value * 1000:.1f} ms" if seconds else f"{value:g}"
            shown.add_row(name.removesuffix("_s").replace("_", " "), text, "" if seconds else f"{grown:+.0f}")
    return shown
