"""Looks closer at the picture or clip of a page."""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray

from baltoro.agent.tool import CallContext, ToolResult
from baltoro.chat.messages import Clip, Image, ToolSpec
from baltoro.world.document import Document


class Viewer:
    """view(url, region?, segment?): the first picture or clip of the page, cut out."""

    spec = ToolSpec(
        "view",
        "View the image or clip of a page.",
        {
            "type": "object",
            "properties": {
                "url": {"type": "string"},
                "region": {
                    "type": "array",
                    "items": {"type": "number"},
                    "minItems": 4,
                    "maxItems": 4,
                    "description": "left, top, right, bottom as fractions of width and height",
                },
                "segment": {
                    "type": "array",
                    "items": {"type": "number"},
                    "minItems": 2,
                    "maxItems": 2,
                    "description": "start and end second",
                },
            },
            "required": ["url"],
        },
    )
    sequential = False

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self._documents = documents

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        document = self._documents.get(str(arguments["url"]))
        if document is None:
            return ToolResult(error=f"there is no page {arguments['url']}")
        if not document.media:
            return ToolResult(error=f"{document.url} has no image and no clip")
        medium = document.media[0]
        try:
            if "segment" in arguments:
                start, end = cast(list[float], arguments["segment"])
                medium = cut_segment(medium, start, end)
            if "region" in arguments:
                left, top, right, bottom = cast(list[float], arguments["region"])
                medium = crop(medium, left, top, right, bottom)
        except ValueError as error:
            return ToolResult(error=str(error))
        return ToolResult((medium,))


def crop(medium: Image | Clip, left: float, top: float, right: float, bottom: float) -> Image | Clip:
    """The pixels that the rectangle touches; coordinates are fractions in [0, 1]. Raises ValueError."""
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError("region must satisfy 0 <= left < right <= 1 and 0 <= top < bottom <= 1")
    if isinstance(medium, Image):
        return Image(_crop_pixels(medium.pixels, left, top, right, bottom))
    return Clip(_crop_pixels(medium.frames, left, top, right, bottom), medium.fps)


def _crop_pixels(pixels: NDArray[np.uint8], left: float, top: float, right: float, bottom: float) -> NDArray[np.uint8]:
    height, width = cast(tuple[int, int], pixels.shape[-3:-1])
    rows = slice(math.floor(top * height), math.ceil(bottom * height))
    columns = slice(math.floor(left * width), math.ceil(right * width))
    return pixels[..., rows, columns, :]


def cut_segment(medium: Image | Clip, start: float, end: float) -> Clip:
    """The frames shown from second `start` to before second `end`. Raises ValueError."""
    if isinstance(medium, Image):
        raise ValueError("an image has no segments")
    times = np.arange(len(medium.frames)) / medium.fps
    frames = medium.frames[(times >= start) & (times < end)]
    if not len(frames):
        raise ValueError(f"no frame lies between {start:g} and {end:g} s")
    return Clip(frames, medium.fps)
