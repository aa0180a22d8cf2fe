"""A small fake desktop for computer use: a window with buttons, a list that scrolls and a text field, drawn pixel by
pixel. The task is to press the buttons in the order that the title bar shows and to type its word; the gold answer is
known by construction."""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from baltoro.chat.messages import Image
from baltoro.world.lettering import STEMS, ink
from baltoro.world.scenes import COLOUR_NAMES, COLOURS

WIDTH, HEIGHT = 224, 168
_BAR, _FOOT, _ROW = 32, 28, 36
_FACE, _PIXELS = "DejaVuSans", 14
_PAPER, _INK, _GREY, _BLUE = (240, 240, 236), (14, 16, 22), (200, 200, 200), (60, 90, 220)


@dataclass(frozen=True)
class DesktopTask:
    """buttons: colours in the order of the list, two a row. order: those to press, in this order. word: to be typed
    into the field."""

    buttons: tuple[str, ...]
    order: tuple[str, ...]
    word: str


def desktop_task(rng: random.Random, presses: tuple[int, int] = (2, 4)) -> DesktopTask:
    """As many buttons as fill four rows, of which the window shows three at a time."""
    buttons = tuple(rng.sample(COLOUR_NAMES, min(8, len(COLOUR_NAMES))))
    return DesktopTask(buttons, tuple(rng.sample(buttons, rng.randint(*presses))), rng.choice(STEMS))


@dataclass
class Desktop:
    """The state of the window. Coordinates are pixels of the screenshot, from its left and top."""

    task: DesktopTask
    scrolled: int = 0
    focused: bool = False
    text: str = ""
    pressed: list[str] = field(default_factory=list[str])

    def click(self, x: int, y: int) -> None:
        self.focused = y >= HEIGHT - _FOOT
        if (button := self._button_at(x, y)) is not None:
            self.pressed.append(button)

    def type(self, text: str) -> None:
        """Goes into the field if that was clicked last, and nowhere otherwise."""
        if self.focused:
            self.text += text

    def scroll(self, rows: int) -> None:
        """Down by `rows`, up where negative; stops at the ends."""
        self.scrolled = min(max(self.scrolled + rows, 0), self._rows - self._visible)

    @property
    def progress(self) -> float:
        """The share of the order that was pressed before the first wrong button."""
        right = 0
        for wanted, pressed in zip(self.task.order, self.pressed, strict=False):
            if wanted != pressed:
                break
            right += 1
        return right / len(self.task.order)

    @property
    def done(self) -> bool:
        return tuple(self.pressed) == self.task.order and self.text == self.task.word

    def centre(self, button: str) -> tuple[int, int]:
        """Where the button stands once its row is scrolled to the top or as near as the list allows."""
        index = self.task.buttons.index(button)
        left, top, right, bottom = self._box(index, min(index // 2, self._rows - self._visible))
        return (left + right) // 2, (top + bottom) // 2

    def screenshot(self) -> Image:
        picture = PillowImage.new("RGB", (WIDTH, HEIGHT), _PAPER)
        draw = ImageDraw.Draw(picture)
        for index, colour in enumerate(self.task.buttons):
            if 0 <= index // 2 - self.scrolled < self._visible:
                border = _INK if colour in self.pressed else _GREY
                draw.rectangle(self._box(index, self.scrolled), COLOURS[colour], border, 3)
        draw.rectangle((0, 0, WIDTH - 1, _BAR - 1), _GREY)
        for place, colour in enumerate(self.task.order):
            draw.rectangle((6 + 22 * place, 8, 22 + 22 * place, 24), COLOURS[colour], _INK)
        draw.rectangle((4, HEIGHT - _FOOT + 4, WIDTH - 5, HEIGHT - 4), "white", _BLUE if self.focused else _GREY, 2)
        bar = (HEIGHT - _BAR - _FOOT) * self._visible // self._rows
        top = _BAR + (HEIGHT - _BAR - _FOOT) * self.scrolled // self._rows
        draw.rectangle((WIDTH - 7, top, WIDTH - 2, top + bar), _GREY)
        pixels = np.asarray(picture, dtype=np.float32).copy()
        _write(pixels, self.task.word, WIDTH - 60, 7)
        _write(pixels, self.text[-20:], 10, HEIGHT - _FOOT + 6)
        return Image(pixels.round().astype(np.uint8))

    @property
    def _rows(self) -> int:
        return -(-len(self.task.buttons) // 2)

    @property
    def _visible(self) -> int:
        return min(self._rows, (HEIGHT - _BAR - _FOOT) // _ROW)

    def _box(self, index: int, scrolled: int) -> tuple[int, int, int, int]:
        """left, top, right, bottom, all inside."""
        left = 8 + (index % 2) * 104
        top = _BAR + (index // 2 - scrolled) * _ROW + 4
        return left, top, left + 95, top + _ROW - 9

    def _button_at(self, x: int, y: int) -> str | None:
        for index, button in enumerate(self.task.buttons):
            left, top, right, bottom = self._box(index, self.scrolled)
            if 0 <= index // 2 - self.scrolled < self._visible and left <= x <= right and top <= y <= bottom:
                return button
        return None


def _write(pixels: np.ndarray, text: str, left: int, top: int) -> None:
    stamp = ink(text, _FACE, _PIXELS)[:, : WIDTH - left - 8]
    rows, columns = stamp.shape
    region = pixels[top : top + rows, left : left + columns]
    region[:] = region + stamp[:, :, None] * (np.array(_INK, np.float32) - region)
