"""What a person sees while a recipe runs: stage, what it learns, time left, and one line of the model's own output."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Shares of a stage (of the run) for which the expected duration counts as if it had been measured: it
# steadies the first estimates and has faded when that share has really been done a few times over.
PRIOR = 0.05
PLAIN_INTERVAL = 5.0


def stage_left(expected: float, fraction: float, done: float, elapsed: float) -> float:
    """Seconds left in a stage of which `fraction` is complete; this process did `done` of it in `elapsed` seconds.

    `done` is smaller than `fraction` when the stage was resumed.
    """
    return (1 - fraction) * (elapsed + PRIOR * expected) / (done + PRIOR)


def slowness(measured: float, expected: float, total: float) -> float:
    """How many times slower than expected this machine is: `measured` seconds went into work expected to take
    `expected`, out of a whole run of `total`."""
    return (measured + PRIOR * total) / (expected + PRIOR * total)


@dataclass
class _Stage:
    name: str
    learns: str
    total: int
    first: int
    began: float
    done: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def fraction(self) -> float:
        return min(self.done / self.total, 1.0)

    @property
    def fraction_here(self) -> float:
        """The share done by this process, without what was there when it began."""
        return self.fraction - self.first / self.total


class Progress:
    """A context manager around the whole run. `expected` holds every stage in order with its expected seconds.

    On a terminal it redraws a few lines at the bottom while other output scrolls above; on a pipe or in a file it
    writes plain lines, at most every 5 seconds besides the beginnings and ends of stages.
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected = dict(expected)
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._stage: _Stage | None = None
        self._measured = 0.0  # seconds that finished stages took in this process
        self._worth = 0.0  # seconds that the same work was expected to take
        self._last_line = float("-inf")
        self._live_text = ""
        self._printed_live_text = ""
        self._display: Live | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            console = Console(file=self._stream)
            if not console.is_dumb_terminal:
                self._display = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
                self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_stage()
        if self._display is not None:
            self._display.stop()

    def stage(self, name: str, what_it_learns: str, total_units: int, done: int = 0) -> None:
        """Ends the stage before and begins `name`, one of `expected`. `done` units exist already when it is resumed."""
        assert name in self._expected, name
        assert total_units > 0
        self._end_stage()
        self._stage = _Stage(name, what_it_learns, total_units, done, self._clock(), done)
        resumed = f", resumed at {done}/{total_units}" if done else ""
        self._write(f"{self._number(self._stage)} {name}: {what_it_learns}{resumed}")
        self._last_line = self._clock()

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` of the stage's units are complete; `metrics` replace the ones shown before."""
        stage = self._stage
        assert stage is not None, "no stage has begun"
        stage.done, stage.metrics = done, dict(metrics)
        if self._display is None and self._clock() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = self._clock()
            left = ", ".join(self._left(stage))
            self._write("  " + "  ".join(filter(None, [f"{stage.name} {done}/{stage.total}", _numbers(metrics), left])))
            if self._live_text != self._printed_live_text:
                self._printed_live_text = self._live_text
                self._write(f"  > {self._live_text}")

    def live(self, text: str) -> None:
        """The model's newest output on the fixed held-out prompt, of which one line is shown.

        A model may write anything: control characters and signs that the stream cannot encode are replaced.
        """
        encoding = self._stream.encoding or "utf-8"
        harmless = "".join(sign if sign.isprintable() else " " for sign in text)
        self._live_text = " ".join(harmless.encode(encoding, "replace").decode(encoding).split())

    def _stage_left(self, stage: _Stage) -> float:
        elapsed = self._clock() - stage.began
        return stage_left(self._expected[stage.name], stage.fraction, stage.fraction_here, elapsed)

    def _run_left(self, stage: _Stage) -> float:
        """This stage at its own pace, the later ones as expected on a machine of the speed seen so far."""
        names = list(self._expected)
        later = sum(self._expected[name] for name in names[names.index(stage.name) + 1 :])
        measured = self._measured + self._clock() - stage.began
        worth = self._worth + self._expected[stage.name] * stage.fraction_here
        return self._stage_left(stage) + later * slowness(measured, worth, sum(self._expected.values()))

    def _left(self, stage: _Stage) -> tuple[str, str]:
        return f"stage {_duration(self._stage_left(stage))} left", f"run {_duration(self._run_left(stage))} left"

    def _end_stage(self) -> None:
        if self._stage is None:
            return
        stage, self._stage = self._stage, None
        took = self._clock() - stage.began
        self._measured += took
        self._worth += self._expected[stage.name] * (1 - stage.first / stage.total)
        self._write(f"  {stage.name} done in {_duration(took)}  {_numbers(stage.metrics)}".rstrip())
        if self._live_text:
            self._write(f"  > {self._live_text}")
            self._printed_live_text = self._live_text

    def _write(self, line: str) -> None:
        if self._display is not None:
            self._display.console.print(Text(line))
        else:
            print(line, file=self._stream, flush=True)

    def _render(self) -> RenderableType:
        stage = self._stage  # read once: Live draws from a thread of its own
        if stage is None:
            return Text("")
        head = Table.grid(padding=(0, 2), expand=True)
        for column in range(5):
            head.add_column(no_wrap=True, overflow="crop", ratio=1 if column == 1 else None)
        stage_time, run_time = self._left(stage)
        head.add_row(
            Text(f"{self._number(stage)} {stage.name}", style="bold"),
            ProgressBar(total=1.0, completed=stage.fraction),
            Text(f"{stage.done}/{stage.total}"),
            Text(stage_time),
            Text(run_time, style="bold"),
        )
        lines = {
            "dim": stage.learns,
            "cyan": _numbers(stage.metrics),
            "green": f"> {self._live_text}" if self._live_text else "",
        }
        return Group(head, *(Text(line, style, no_wrap=True, overflow="crop") for style, line in lines.items()))

    def _number(self, stage: _Stage) -> str:
        return f"[{list(self._expected).index(stage.name) + 1}/{len(self._expected)}]"


def _numbers(metrics: Mapping[str, float]) -> str:
    # Four digits, but thousands are written out: 12,345 rather than 1.234e+04.
    return "  ".join(
        f"{name} {value:{',.0f' if 1e4 <= abs(value) < 1e9 else '.4g'}}" for name, value in metrics.items()
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
