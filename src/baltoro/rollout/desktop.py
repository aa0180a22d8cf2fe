"""Computer use on the fake desktop of the built-in world: screenshots in, clicks, keys and scrolling out."""

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from baltoro.agent.loop import Limits
from baltoro.chat.messages import Image
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Reward, Task, metric
from baltoro.rollout.toolset import toolset
from baltoro.world.desktop import Desktop, DesktopTask, desktop_task


def sample(seed: int) -> Task:
    task = desktop_task(random.Random(seed))
    return {"buttons": list(task.buttons), "order": list(task.order), "word": task.word}


@asynccontextmanager
async def open_desktop(task: Task, seed: int) -> AsyncGenerator[World]:
    desktop = Desktop(DesktopTask(tuple(task["buttons"]), tuple(task["order"]), task["word"]))

    async def click(x: int, y: int) -> Image:
        """Click at a pixel of the screenshot.

        x: from the left
        y: from the top
        """
        desktop.click(x, y)
        return desktop.screenshot()

    async def type_text(text: str) -> Image:
        """Type into the field that was clicked last."""
        desktop.type(text)
        return desktop.screenshot()

    async def scroll(rows: int) -> Image:
        """Scroll the list.

        rows: down; up where negative
        """
        desktop.scroll(rows)
        return desktop.screenshot()

    yield World(
        (
            "Press the buttons in the order of the colours in the title bar, then type its word into the field.",
            desktop.screenshot(),
        ),
        toolset(click, type_text, scroll, sequential=True),
        facts=lambda: {"progress": desktop.progress, "finished": float(desktop.done)},
    )


env = Env(
    "desktop",
    "1",
    sample,
    open_desktop,
    Judge(
        Reward("done", lambda task, trace: trace.signals["finished"]),
        metric("actions", lambda task, trace: float(sum(len(turn.results) for turn in trace.turns))),
    ),
    Limits(max_turns=16, max_context_tokens=8192, max_turn_tokens=256),
)
