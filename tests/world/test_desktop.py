import dataclasses
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baltoro.world.desktop import HEIGHT, WIDTH, Desktop, DesktopTask, desktop_task
from baltoro.world.scenes import COLOURS

TASK = DesktopTask(("red", "green", "blue", "yellow", "purple", "orange", "cyan"), ("cyan", "red"), "bal")


def solve(desktop: Desktop) -> None:
    """As a careful person would, from what can be known of the window."""
    for button in desktop.task.order:
        desktop.scroll(-9)
        desktop.scroll(desktop.task.buttons.index(button) // 2)
        desktop.click(*desktop.centre(button))
    desktop.click(WIDTH // 2, HEIGHT - 10)
    desktop.type(desktop.task.word)


@given(st.integers(0, 2**32))
def test_every_task_can_be_solved_and_only_in_its_order(seed: int) -> None:
    task = desktop_task(random.Random(seed))
    right, wrong = Desktop(task), Desktop(dataclasses.replace(task, order=task.order[::-1]))
    solve(right)
    assert (right.done, right.progress) == (True, 1.0)
    solve(wrong)
    assert not Desktop(task, text=task.word, pressed=wrong.pressed).done


def test_progress_ends_at_the_first_wrong_button() -> None:
    desktop = Desktop(dataclasses.replace(TASK, order=("red", "green", "blue", "yellow")))
    for button, progress in (("red", 0.25), ("green", 0.5), ("yellow", 0.5), ("blue", 0.5)):
        desktop.click(*desktop.centre(button))
        assert desktop.progress == progress


def test_what_the_window_does() -> None:
    desktop = Desktop(TASK)
    desktop.type("lost")  # the field was not clicked
    desktop.click(20, HEIGHT - 10)
    desktop.type("ba")
    desktop.type("l")
    assert desktop.text == "bal"
    desktop.click(*desktop.centre("red"))
    desktop.type("lost too")
    desktop.scroll(-1)
    assert (desktop.text, desktop.scrolled) == ("bal", 0)
    desktop.scroll(9)  # four rows, three of them visible
    assert desktop.scrolled == 1
    desktop.click(100, 40 + 3 * 36)  # below the last row there is nothing
    assert desktop.pressed == ["red"]


def test_the_screenshot_shows_what_matters() -> None:
    """The colour under the centre of each button in sight, the typed text, the focus, the pressed border."""
    desktop = Desktop(TASK)
    before = desktop.screenshot().pixels
    assert before.shape == (HEIGHT, WIDTH, 3)
    for index, button in enumerate(TASK.buttons):
        x, y = desktop.centre(button)
        desktop.scroll(index // 2)
        assert tuple(desktop.screenshot().pixels[y, x]) == COLOURS[button]
        desktop.scroll(-9)
    assert not any((before[33 : HEIGHT - 28] == COLOURS["cyan"]).all(-1).ravel())  # in the row below the window
    for act in (
        lambda: desktop.click(*desktop.centre("red")),
        lambda: desktop.click(20, HEIGHT - 10),
        lambda: desktop.type("x"),
        lambda: desktop.scroll(1),
    ):
        act()
        after = desktop.screenshot().pixels
        assert (after != before).any()
        assert np.array_equal(after, desktop.screenshot().pixels)
        before = after
