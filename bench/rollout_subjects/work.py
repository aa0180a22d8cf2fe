"""What every subject of bench/rollouts.py does, and how it is measured; standard library alone.

Every task asks a model turn after turn; each answer is one call of a tool, whose result goes into the next prompt. The
tool call of the last turn waits until everybody is there: then all tasks are live, and the memory of each, the cost of
each turn on the way and the time to cancel all of them are known. The model answers at once.
"""

import asyncio
import contextlib
import json
import os
import resource
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

TURNS = 6
QUESTION = (
    "Which of the villages along the glacier has the oldest bridge, and in which year was it built? Look every village "
    "up in the register before you answer, and give the name and the year."
)
REASONING = "The register must be asked about the next village; so far none of the bridges is older than the first."
FINDING = (
    "The village lies on the left bank, at 3,120 metres; it has 212 inhabitants and a bridge of ropes that was built "
    "in 1874 and renewed twice since."
)
TOOL = {
    "name": "look_up",
    "description": "Looks a village up in the register.",
    "parameters": {
        "type": "object",
        "properties": {"village": {"type": "string"}, "year": {"type": "integer"}},
        "required": ["village"],
    },
}


def arguments(turn: int) -> dict[str, object]:
    return {"village": f"Askole {turn}", "year": 1874 + turn}


class Work:
    """The tool that all tasks call, and the numbers of one run of `tasks` tasks."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.turns = 0
        self.waiting = 0
        self.everybody = asyncio.Event()
        self._lags: list[float] = []
        self._memory = _memory()
        self._begin, self._cpu = time.perf_counter(), time.process_time()

    async def run(self, agent: "Callable[[Work], Coroutine[Any, Any, object]]") -> None:
        """One bare task for each agent, from the first until all are cancelled; then the report."""
        async with self.lags():
            running = [asyncio.create_task(agent(self)) for _ in range(self.tasks)]
            await self.everybody.wait()
        self.all_live()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self.report()

    async def look_up(self, village: str, year: int = 0) -> str:
        self.turns += 1
        if year == 1874 + TURNS - 1:
            self.waiting += 1
            if self.waiting == self.tasks:
                self.everybody.set()
            await asyncio.get_running_loop().create_future()
        return FINDING

    @contextlib.asynccontextmanager
    async def lags(self) -> AsyncGenerator[None]:
        """How late a timer of 10 milliseconds is, while the tasks work."""

        async def watch() -> None:
            while True:
                due = time.perf_counter() + 0.01
                await asyncio.sleep(0.01)
                self._lags.append(time.perf_counter() - due)

        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch())
            yield
            watcher.cancel()

    def all_live(self) -> None:
        """Everybody waits in a tool."""
        self._seconds, self._used = time.perf_counter() - self._begin, time.process_time() - self._cpu
        self._held = _memory() - self._memory
        self._cancelling = time.perf_counter()

    def report(self) -> None:
        """Everybody is cancelled and gone."""
        lags = sorted(self._lags) or [self._seconds]
        record = {
            "tasks": self.tasks,
            "turns_s": self.turns / self._seconds,
            "cpu_us_a_turn": self._used / self.turns * 1e6,
            "kb_a_task": self._held / self.tasks / 1e3,
            "lag_p50_ms": lags[len(lags) // 2] * 1e3,
            "lag_p99_ms": lags[int(len(lags) * 0.99)] * 1e3,
            "cancel_s": time.perf_counter() - self._cancelling,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }
        print(json.dumps({name: round(value, 4) for name, value in record.items()}))


def _memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
