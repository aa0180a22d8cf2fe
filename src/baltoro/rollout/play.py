"""A person plays an environment in the terminal: sees what a model would see, calls its tools, earns its reward."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from baltoro.chat.messages import Clip, Image, Message, ToolCall, ToolSpec, Video, assistant
from baltoro.rollout.env import Env, Session

_COLUMNS = 72
_HELP = 'Call a tool: NAME key=value key="two words". Answer: answer TEXT. Leave: quit.'


async def play(
    env: Env, seed: int, folder: Path, read: Callable[[str], str], write: Callable[[str], None], colours: bool
) -> float | None:
    """The reward; None where the person left, or the judge had none. Pictures are written into `folder`."""
    session = Session(env)
    try:
        task = env.sample(seed)
        write(f"{env.name} {env.version}, task {seed}")
        pictures = _Pictures(folder, write, colours)
        pictures.show(await session.reset(task, seed))
        write(_HELP)
        for tool in session.tools:
            write(_signature(tool))
        while True:
            line = (await asyncio.to_thread(read, "> ")).strip()
            if line == "quit":
                return None
            try:
                action = _action(line, len(session.turns))
            except ValueError as error:
                write(f"{error}. {_HELP}")
                continue
            step = await session.step(action)
            pictures.show(step.observation)
            if step.terminated or step.truncated:
                for name, value in step.info["signals"].items():
                    write(f"{name}: {value:g} {step.info['reasons'].get(name, '')}")
                write(f"reward: {step.reward:g}")
                return None if np.isnan(step.reward) else step.reward
    finally:
        await session.close()


def _action(line: str, turn: int) -> Message:
    name, _, rest = line.partition(" ")
    if not name:
        raise ValueError("Say what to do")
    if name == "answer":
        return assistant(rest.strip())
    arguments: dict[str, Any] = {}
    pattern = re.compile(r'\s*(\w+)=("(?:[^"\\]|\\.)*"|\[[^\]]*\]|\S+)')
    at = 0
    while rest[at:].strip():
        found = pattern.match(rest, at)
        if not found:
            raise ValueError(f"{rest[at:].strip()} is not of the form key=value")
        key, value = found.groups()
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key] = value
        at = found.end()
    return assistant(tool_calls=(ToolCall(f"functions.{name}:{turn}", name, json.dumps(arguments)),))


def _signature(tool: ToolSpec) -> str:
    properties: Any = tool.parameters.get("properties", {})
    words = " ".join(f"{name}=<{value.get('type', 'value')}>" for name, value in properties.items())
    return f"  {tool.name} {words}   {printable(tool.description)}"


def printable(text: str) -> str:
    """Without control characters: a page must not write to the terminal what it likes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)


class _Pictures:
    def __init__(self, folder: Path, write: Callable[[str], None], colours: bool) -> None:
        self._folder = folder
        self._write = write
        self._colours = colours
        self._count = 0

    def show(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            for part in message.content:
                match part:
                    case str():
                        self._write(printable(part))
                    case Image():
                        self._picture(part.pixels)
                    case Clip():
                        for frame in part.frames:
                            self._picture(frame)
                    case Video():
                        self._write("[a video file]")

    def _picture(self, pixels: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._count += 1
        path = self._folder / f"{self._count:03d}.png"
        picture = PillowImage.fromarray(pixels)
        picture.save(path)
        self._write(f"[{path}, {picture.width} x {picture.height}]")
        if self._colours:
            self._write(blocks(picture))


def blocks(picture: PillowImage.Image) -> str:
    """Two pixels a character, one above the other, in 24-bit colours."""
    width = min(_COLUMNS, picture.width)
    height = max(2, round(picture.height * width / picture.width))
    small = np.asarray(picture.convert("RGB").resize((width, height + height % 2)))
    lines: list[str] = []
    for above, below in zip(small[::2], small[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(above, below, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
