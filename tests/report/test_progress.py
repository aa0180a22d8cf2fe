import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.report.progress import Progress, slowness, stage_left

seconds = st.floats(1, 1e6)
share = st.floats(0.01, 1)


@given(seconds, share, share)
def test_at_the_expected_pace_the_rest_is_the_expected_rest(expected: float, fraction: float, part: float):
    done = part * fraction  # the other part was there before a resume
    assert stage_left(expected, fraction, done, expected * done) == pytest.approx(expected * (1 - fraction))
    assert slowness(expected * done, expected * done, expected) == pytest.approx(1)


@given(seconds, share, seconds)
def test_the_estimate_lies_between_the_expected_pace_and_the_measured_one(expected: float, done: float, elapsed: float):
    bounds = sorted([expected * (1 - done), elapsed / done * (1 - done)])
    assert bounds[0] * 0.999 <= stage_left(expected, done, done, elapsed) <= bounds[1] * 1.001
    measured = elapsed / (expected * done)
    assert min(1, measured) * 0.999 <= slowness(elapsed, expected * done, expected) <= max(1, measured) * 1.001


def test_before_anything_is_measured_the_estimate_is_the_expectation():
    assert stage_left(80.0, fraction=0.25, done=0.0, elapsed=0.0) == pytest.approx(60.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_of_a_run_worked_by_hand():
    clock, stream = Clock(), io.StringIO()
    with Progress({"vit": 100.0, "sft": 200.0, "rl": 100.0, "eval": 50.0}, stream, clock) as progress:
        progress.stage("vit", "pictures to words", 10)
        clock.now += 60
        progress.live("a red\ncircle")
        progress.update(5, {"loss": 2.34567})
        clock.now += 60
        progress.update(10, {"loss": 1.0})
        progress.stage("sft", "to answer", 100, done=80)
        clock.now += 40
        progress.update(90, {"loss": 0.5, "accuracy": 0.25})
        progress.live("a blue square")
        progress.stage("rl", "to act", 10)
        clock.now += 10
        progress.update(1, {"tokens": 12345.4, "rate": 3e-5})
    # vit at half: 60 s measured and 0.05 * 100 expected for 0.55 of the stage, so 65 / 0.55 * 0.5 = 59.1 s are left;
    # 60 s for work worth 50, eased by 0.05 * 450: 82.5 / 72.5 of the 350 s to come, 398.3 s; together 7m37s.
    # vit complete: (120 + 22.5) / (100 + 22.5) of 350 s, 407.1 s.
    # sft resumed at 0.8: 40 s for 0.1 of it, (40 + 10) / 0.15 * 0.1 = 33.3 s for the last tenth; then 160 s for work
    # worth 120, so 182.5 / 142.5 of 150 s, 192.1 s; together 3m45s.
    # rl: (10 + 5) / (0.1 + 0.05) * 0.9 = 90 s; then 170 s for work worth 150 (sft counted for a fifth, 40 s), so
    # 192.5 / 172.5 of 50 s, 55.8 s; together 2m26s.
    assert stream.getvalue().splitlines() == [
        "[1/4] vit: pictures to words",
        "  vit 5/10  loss 2.346  stage 59s left, run 7m37s left",
        "  > a red circle",
        "  vit 10/10  loss 1  stage 0s left, run 6m47s left",
        "  vit done in 2m00s  loss 1",
        "  > a red circle",
        "[2/4] sft: to answer, resumed at 80/100",
        "  sft 90/100  loss 0.5  accuracy 0.25  stage 33s left, run 3m45s left",
        "  sft done in 40s  loss 0.5  accuracy 0.25",
        "  > a blue square",
        "[3/4] rl: to act",
        "  rl 1/10  tokens 12,345  rate 3e-05  stage 1m30s left, run 2m26s left",
        "  rl done in 10s  tokens 12,345  rate 3e-05",
        "  > a blue square",
    ]


def test_plain_lines_come_at_most_every_five_seconds():
    clock, stream = Clock(), io.StringIO()
    with Progress({"vit": 100.0}, stream, clock) as progress:
        progress.stage("vit", "x", 100)
        for done in range(1, 25):
            clock.now += 0.5
            progress.update(done, {})
    lines = [line.split()[1] for line in stream.getvalue().splitlines() if "left" in line]
    assert lines == ["10/100", "20/100"]


def test_an_error_ends_the_display_without_calling_the_stage_done():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="disk"), Progress({"vit": 100.0}, stream) as progress:
        progress.stage("vit", "x", 100)
        raise ValueError("disk")
    assert "done" not in stream.getvalue()


SCRIPT = """
import os, sys
from baltoro.report.progress import Progress
wait = (lambda: os.read(int(sys.argv[1]), 1)) if sys.argv[1:] else (lambda: None)
with Progress({"vit": 60.0, "sft": 60.0}, clock=lambda: 0.0) as progress:
    progress.stage("vit", "pictures to words", 10)
    progress.update(5, {"loss": 2.5})
    progress.live("x" * 60)
    wait()
    progress.live("na\\u00efve \\x1b[31m[bold]\\n\\u767b\\ud800")
    wait()
    print("from elsewhere")
    progress.stage("sft", "to answer", 10, done=2)
    wait()
    progress.update(5, {"loss": 0.5})
    wait()
print("after")
"""
AWAITED = ["> xxx", "> na\u00efve", "\x1b[2mto answer", "loss 0.5"]  # what the screen must show before each wait() ends


class Screen:
    """As much of a terminal as a live display may ask for; anything else fails the test."""

    def __init__(self, columns: int) -> None:
        self.lines, self.row, self.column, self.columns, self.cursor = [""], 0, 0, columns, True
        self.seen: set[str] = set()

    def feed(self, text: str) -> None:
        for control, sign in re.findall(r"(\x1b\[[?0-9;]*[a-zA-Z])|(.)", text, re.DOTALL):
            self.seen.add(self.lines[self.row].rstrip())
            if sign == "\r":
                self.column = 0
            elif sign == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.lines):
                    self.lines.append("")
            elif sign:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + sign + line[self.column + 1 :]
                self.column += 1
                assert self.column <= self.columns, "a line wrapped"
            elif control == "\x1b[2K":
                self.lines[self.row] = ""
            elif move := re.fullmatch(r"\x1b\[(\d+)A", control):
                self.row -= int(move[1])
            elif control in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor = control.endswith("h")
            else:
                assert control.endswith("m"), repr(control)


def on_terminal(columns: int, awaited: list[str], interrupt: bool = False) -> tuple[int, Screen]:
    """Runs the script on a pseudo-terminal of its own; at the last `awaited` text it may send Ctrl-C instead."""
    ours, theirs = pty.openpty()
    go, proceed = os.pipe()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(go)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        pass_fds=[go],
    )
    os.close(theirs)
    watchdog = threading.Timer(45, process.kill)
    watchdog.start()
    output, seen, left = b"", 0, list(awaited)
    while piece := read(ours):
        output += piece
        while left and (at := output.find(left[0].encode(), seen)) >= 0:
            seen = at + len(left.pop(0))
            if interrupt and not left:
                process.send_signal(signal.SIGINT)
            else:
                os.write(proceed, b".")
    status = process.wait()
    watchdog.cancel()
    for descriptor in (ours, go, proceed):
        os.close(descriptor)
    assert not left, f"never shown: {left}"
    screen = Screen(columns)
    screen.feed(output.decode())
    return status, screen


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says EIO when the last writer has gone
        return b""


@pytest.mark.parametrize("columns", [80, 40])
def test_on_a_terminal_the_display_lives_below_and_leaves_only_lines(columns: int):
    status, screen = on_terminal(columns, AWAITED)
    assert status == 0
    assert screen.cursor
    assert not any(screen.lines[screen.row :]), "something is left below the cursor"
    assert [line.rstrip() for line in screen.lines[: screen.row]] == [
        "[1/2] vit: pictures to words",
        "from elsewhere",
        "  vit done in 0s  loss 2.5",
        "  > naïve [31m[bold] 登",
        "[2/2] sft: to answer, resumed at 2/10",
        "  sft done in 0s  loss 0.5",
        "  > naïve [31m[bold] 登",
        "after",
    ]
    # At half a stage worth 60 s, with no time on the clock: 0.5 * 3 / 0.55 = 2.7 s.
    live = " ".join(screen.seen)
    assert "pictures to words" in screen.seen
    assert "loss 2.5" in screen.seen
    assert "> naïve [31m[bold] 登" in screen.seen
    assert ("> " + "x" * 60)[:columns] in screen.seen  # one line, cut where the terminal ends
    assert columns < 80 or ("5/10  stage 3s left" in live and "2/10  stage" in live)


def test_ctrl_c_on_a_terminal_gives_the_terminal_back():
    status, screen = on_terminal(200, AWAITED[:3], interrupt=True)
    assert status == -signal.SIGINT
    assert screen.cursor
    assert not any("━" in line for line in screen.lines)
    assert any("KeyboardInterrupt" in line for line in screen.lines)


def test_on_an_ascii_pipe_there_are_only_plain_lines():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=True)
    assert done.stderr == b""
    assert done.stdout.decode("ascii").splitlines() == [
        "[1/2] vit: pictures to words",
        "from elsewhere",
        "  vit done in 0s  loss 2.5",
        "  > na?ve [31m[bold] ?",
        "[2/2] sft: to answer, resumed at 2/10",
        "  sft done in 0s  loss 0.5",
        "  > na?ve [31m[bold] ?",
        "after",
    ]


def test_an_unplanned_stage_is_our_mistake():
    with Progress({"vit": 1.0}, io.StringIO()) as progress, pytest.raises(AssertionError):
        progress.stage("rl", "x", 1)
