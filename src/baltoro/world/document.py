"""A page of the built-in world."""

from dataclasses import dataclass

from baltoro.chat.messages import Clip, Image, Part


@dataclass(frozen=True, eq=False)
class Document:
    """What stands at a url: a title, then text, images and clips in reading order."""

    url: str
    title: str
    body: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.body if isinstance(part, str))

    @property
    def media(self) -> tuple[Image | Clip, ...]:
        return tuple(part for part in self.body if isinstance(part, Image | Clip))
