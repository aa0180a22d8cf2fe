"""What a person types is what is played; what the world says cannot write to the terminal."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from baltoro.agent.loop import Limits
from baltoro.chat.messages import Image
from baltoro.rollout.desktop import env as desktop
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Reward, Task
from baltoro.rollout.play import blocks, play
from baltoro.rollout.toolset import toolset
from baltoro.world.desktop import HEIGHT, WIDTH, Desktop, DesktopTask


def run(env: Env, folder: Path, *lines: str, colours: bool = False) -> tuple[float | None, str]:
    typed, written = iter(lines), list[str]()
    reward = asyncio.run(play(env, 5, folder, lambda _: next(typed), written.append, colours))
    assert next(typed, None) is None
    return reward, "\n".join(written)


def test_a_person_solves_the_desktop(tmp_path: Path) -> None:
    task = desktop.sample(5)
    window = Desktop(DesktopTask(tuple(task["buttons"]), tuple(task["order"]), task["word"]))
    lines: list[str] = []
    for button in task["order"]:
        x, y = window.centre(button)
        lines += ["scroll rows=-9", f"scroll rows={task['buttons'].index(button) // 2}", f"click x={x} y={y}"]
    lines += [f"click x=20 y={HEIGHT - 9}", f'type_text text="{task["word"]}"']
    reward, written = run(desktop, tmp_path, *lines, "answer done")
    assert reward == 1.0
    assert "done: 1" in written
    shots = sorted(tmp_path.iterdir())
    assert len(shots) == len(lines) + 1
    with PillowImage.open(shots[0]) as shot:
        assert shot.size == (WIDTH, HEIGHT)


@asynccontextmanager
async def hostile(task: Task, seed: int) -> AsyncGenerator[World]:
    async def say(text: str, times: int = 1) -> str:
        """Say."""
        return f"{text * times}\x1b[2J\x9b31m\rowned"

    yield World(("hello\x1b]0;owned\x07",), toolset(say))


HOSTILE = Env("h", "1", lambda seed: {}, hostile, Judge(Reward("done", lambda task, trace: 1.0)), Limits(9, 99, 9))


def test_text_cannot_steer_the_terminal(tmp_path: Path) -> None:
    _, written = run(HOSTILE, tmp_path, 'say text="a b" times=2', "quit")
    assert "a ba b�[2J�31m�owned" in written
    assert not set(written) & set("\x1b\x9b\r\x07")


@pytest.mark.parametrize("line", ["", "say text", "say text=1 =", 'say "x"'])
def test_what_is_not_understood_is_no_turn(tmp_path: Path, line: str) -> None:
    reward, written = run(HOSTILE, tmp_path, line, "quit")
    assert reward is None
    assert written.count("Call a tool:") == 2


def test_blocks_by_hand(tmp_path: Path) -> None:
    """Two pixels, one above the other, are one character."""
    picture = np.array([[[1, 2, 3]], [[4, 5, 6]]], np.uint8)
    assert blocks(PillowImage.fromarray(picture)) == "\x1b[38;2;1;2;3m\x1b[48;2;4;5;6m▀\x1b[0m"

    @asynccontextmanager
    async def shows(task: Task, seed: int) -> AsyncGenerator[World]:
        yield World((Image(picture),))

    env = Env("s", "1", lambda seed: {}, shows, HOSTILE.judge, HOSTILE.limits)
    assert "▀" in run(env, tmp_path, "quit", colours=True)[1]
    assert "▀" not in run(env, tmp_path, "quit")[1]
