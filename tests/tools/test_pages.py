"""The reader and the viewer on pages whose pixels say where they come from."""

from itertools import pairwise

import numpy as np
import pytest

from baltoro.agent.tool import CallContext
from baltoro.chat.messages import Clip, Image
from baltoro.chat.schema import parse_arguments
from baltoro.tools.reader import Reader
from baltoro.tools.viewer import Viewer, crop, cut_segment
from baltoro.world.document import Document

CONTEXT = CallContext(None, 0, 0.0)


def coordinates(height: int, width: int) -> np.ndarray:
    """Pixel (row, column) holds (row, column, 0)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


IMAGE = Image(coordinates(20, 40))
# Frame i holds the value i; 3 s at 2 frames per second.
CLIP = Clip(np.stack([np.full((8, 8, 3), i, np.uint8) for i in range(6)]), 2.0)
PAGES = {
    page.url: page
    for page in (
        Document("u/text", "Text", ("one", "two")),
        Document("u/image", "Image", ("before", IMAGE, "after")),
        Document("u/clip", "Clip", (CLIP,)),
    )
}


async def test_reader_returns_text_and_images_and_announces_clips() -> None:
    reader = Reader(PAGES)
    assert (await reader.call({"url": "u/text"}, CONTEXT)).shown == ("one", "two")
    assert (await reader.call({"url": "u/image"}, CONTEXT)).shown == ("before", IMAGE, "after")
    assert (await reader.call({"url": "u/clip"}, CONTEXT)).shown == ("[clip of 3 s]",)
    assert (await reader.call({"url": "u/none"}, CONTEXT)).shown == ("error: there is no page u/none",)


@pytest.mark.parametrize(
    ("region", "rows", "columns"),
    [
        ((0, 0, 1, 1), (0, 20), (0, 40)),
        ((0.5, 0, 1, 0.5), (0, 10), (20, 40)),
        ((0.25, 0.25, 0.5, 0.75), (5, 15), (10, 20)),
        ((0.99, 0.99, 1, 1), (19, 20), (39, 40)),  # never smaller than a pixel
        ((0.26, 0.01, 0.27, 0.02), (0, 1), (10, 11)),  # every pixel that it touches
    ],
)
def test_crop(region: tuple[float, float, float, float], rows: tuple[int, int], columns: tuple[int, int]) -> None:
    part = crop(IMAGE, *region)
    assert isinstance(part, Image)
    assert (part.pixels[0, 0, :2] == (rows[0], columns[0])).all()
    assert (part.pixels[-1, -1, :2] == (rows[1] - 1, columns[1] - 1)).all()


@pytest.mark.parametrize(
    ("segment", "frames"),
    [((0, 3), [0, 1, 2, 3, 4, 5]), ((1, 2), [2, 3]), ((0.4, 1.1), [1, 2]), ((2.5, 99), [5]), ((-5, 0.1), [0])],
)
def test_segment(segment: tuple[float, float], frames: list[int]) -> None:
    part = cut_segment(CLIP, *segment)
    assert part.frames[:, 0, 0, 0].tolist() == frames
    assert part.fps == 2.0


def test_segments_of_a_partition_are_a_partition() -> None:
    cuts = [0, 0.5, 1.2, 1.9, 3.0]
    parts = [cut_segment(CLIP, start, end).frames for start, end in pairwise(cuts)]
    assert (np.concatenate(parts) == CLIP.frames).all()


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"url": "u/none"}, "there is no page u/none"),
        ({"url": "u/text"}, "u/text has no image and no clip"),
        ({"url": "u/image", "region": [0.5, 0, 0.5, 1]}, "region must satisfy"),
        ({"url": "u/image", "region": [0, 0, 2, 1]}, "region must satisfy"),
        ({"url": "u/image", "region": [0, float("nan"), 1, 1]}, "region must satisfy"),
        ({"url": "u/image", "segment": [0, 1]}, "an image has no segments"),
        ({"url": "u/clip", "segment": [5, 9]}, "no frame lies between 5 and 9 s"),
        ({"url": "u/clip", "segment": [2, 1]}, "no frame lies between 2 and 1 s"),
    ],
)
async def test_what_cannot_be_viewed_is_an_error_for_the_model(arguments: dict[str, object], seen: str) -> None:
    result = await Viewer(PAGES).call(arguments, CONTEXT)
    assert seen in result.error
    assert not result.content


async def test_view_of_a_clip_takes_segment_and_region_together() -> None:
    arguments = {"url": "u/clip", "segment": [1, 2], "region": [0, 0, 0.5, 0.25]}
    [part] = (await Viewer(PAGES).call(dict(arguments), CONTEXT)).shown
    assert isinstance(part, Clip)
    assert part.frames.shape == (2, 2, 4, 3)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"url": "u", "region": [0, 0, 1]}', "region has 3 items"),
        ('{"url": "u", "region": [0, 0, 1, "1"]}', r"region\[3\] must be of type number"),
        ('{"url": "u", "segment": 3}', "segment must be of type array"),
        ('{"region": [0, 0, 1, 1]}', 'arguments lacks "url"'),
    ],
)
def test_the_schema_of_view_refuses(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_arguments(text, Viewer.spec.parameters)
    assert parse_arguments('{"url": "u", "region": [0, 0.5, 1, 1]}', Viewer.spec.parameters)["region"] == [0, 0.5, 1, 1]
