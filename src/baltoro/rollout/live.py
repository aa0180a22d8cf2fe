"""A running manager, watched in the terminal: `async with manager.run(), watched(manager, Console()): ...`"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext

from rich.console import Console
from rich.live import Live
from rich.table import Table

from baltoro.rollout.lag import LoopLag
from baltoro.rollout.manager import RolloutManager

_PERIOD_S = 0.5
_PLAIN_PERIOD_S = 5.0


@asynccontextmanager
async def watched(
    manager: RolloutManager, console: Console, engine: Callable[[], Mapping[str, float]] = dict[str, float]
) -> AsyncGenerator[None]:
    """Shows the numbers of the manager and of the engine and the loop's lag while the block runs, and once more at its
    end: a table on a terminal, elsewhere a line every five seconds."""
    lag = LoopLag()
    drawn = console.is_terminal and not console.is_dumb_terminal

    def numbers() -> dict[str, float]:
        told = {f"engine_{name}": value for name, value in engine().items()}
        return {**manager.numbers(), **told, **lag.numbers()}

    def show(now: Mapping[str, float], before: Mapping[str, float]) -> None:
        if drawn:
            live.update(table(now, before), refresh=True)
        else:
            print(line(now), file=console.file, flush=True)

    async def refresh() -> None:
        before = numbers()
        while True:
            await asyncio.sleep(_PERIOD_S if drawn else _PLAIN_PERIOD_S)
            now = numbers()
            show(now, before)
            before = now

    live = Live(console=console, auto_refresh=False)
    with live if drawn else nullcontext():
        async with lag.watch(), asyncio.TaskGroup() as group:
            refreshing = group.create_task(refresh())
            try:
                yield
            finally:
                refreshing.cancel()
                last = numbers()
                show(last, last)


def line(now: Mapping[str, float]) -> str:
    """Numbers that are not 0."""
    return "  ".join(["rollouts:", *(f"{_name(name)} {_text(name, value)}" for name, value in now.items() if value)])


def table(now: Mapping[str, float], before: Mapping[str, float]) -> Table:
    """Numbers that are not 0, and by how much they grew in a second since `before`."""
    shown = Table(title="rollouts")
    shown.add_column("")
    shown.add_column("now", justify="right")
    shown.add_column("a second", justify="right")
    for name, value in now.items():
        grown = (value - before.get(name, 0.0)) / _PERIOD_S
        if value or grown:
            shown.add_row(_name(name), _text(name, value), "" if name.endswith("_s") else f"{grown:+.0f}")
    return shown


def _name(name: str) -> str:
    return name.removesuffix("_s").replace("_", " ")


def _text(name: str, value: float) -> str:
    return f"{value * 1000:.1f} ms" if name.endswith("_s") else f"{value:.15g}"
