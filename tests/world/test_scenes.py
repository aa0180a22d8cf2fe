import itertools
import random
from typing import cast

import numpy as np
import pytest
from scipy import ndimage

from baltoro.score.polygons import polygon_iou
from baltoro.world.scenes import (
    ALONE,
    COLOURS,
    CROWD,
    FEW,
    SHAPES,
    Room,
    Scene,
    Split,
    cell_of,
    place,
    stencil,
)

SPLITS: tuple[Split, ...] = ("train", "heldout")
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def scenes(seed: int, split: Split, room: Room, size: int, n: int) -> list[Scene]:
    rng = random.Random(seed)
    drawn = (place(rng, split, room, rng.choices(KINDS, k=size)) for _ in range(n))
    return [scene for scene in drawn if scene is not None]


def nearest_colour(pixel: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.square(pixel.astype(float) - COLOURS[name]).sum()))


def test_splits_share_no_colour_shape_cell_and_ground_and_leave_none_out():
    entities = {
        split: {
            (thing.colour, thing.shape, scene.ground, *cell_of(scene, thing))
            for room, size in ((ALONE, 1), (FEW, 3), (CROWD, 6))
            for scene in scenes(1, split, room, size, 2000)
            for thing in scene.things
        }
        for split in SPLITS
    }
    assert not entities["train"] & entities["heldout"]
    # Of nine cells one or two, nine in all for the seven colours of a shape and ground.
    assert len(entities["train"]) == 4 * 3 * (7 * 9 - 9)
    assert len(entities["heldout"]) == 4 * 3 * 9
    for first, second in itertools.combinations(range(5), 2):
        pairs = [{(entity[first], entity[second]) for entity in entities[split]} for split in SPLITS]
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("room", "size"), [(ALONE, 1), (FEW, 3), (CROWD, 6)])
def test_the_picture_shows_what_the_scene_says(split: Split, room: Room, size: int):
    for scene in scenes(2, split, room, size, 150):
        pixels = scene.render().pixels
        assert pixels.shape == (scene.height, scene.width, 3)
        painted = (pixels != np.array(scene.ground, dtype=np.uint8)).any(axis=2)
        # Diagonal neighbours count as joined, so separate components really stand apart.
        labels, components = cast(tuple[np.ndarray, int], ndimage.label(painted, structure=np.ones((3, 3))))
        assert components == len(scene.things)
        boxes = {(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in ndimage.find_objects(labels)}
        assert boxes == {(t.x, t.y, t.x + t.size, t.y + t.size) for t in scene.things}
        for thing in scene.things:
            assert thing.size >= 12
            middle = pixels[thing.y + thing.size // 2, thing.x + thing.size // 2]
            assert nearest_colour(middle) == thing.colour


def test_boxes_in_32nds_are_off_by_half_a_unit_at_most():
    for scene in scenes(3, "train", FEW, 2, 200):
        for thing in scene.things:
            x0, y0, x1, y1 = scene.box(thing)
            exact = np.array([thing.x, thing.y, thing.x + thing.size, thing.y + thing.size], dtype=float)
            exact *= 32 / np.array([scene.width, scene.height] * 2)
            assert np.abs(exact - [x0, y0, x1, y1]).max() <= 0.5
            assert 0 <= x0 < x1 <= 31
            assert 0 <= y0 < y1 <= 31


def test_outlines_cover_what_is_painted():
    overlaps: list[float] = []
    for scene in scenes(4, "train", FEW, 1, 300):
        (thing,) = scene.things
        if thing.shape not in ("square", "triangle"):
            continue
        values = scene.outline(thing)
        unit = np.array([scene.width, scene.height]) / 32
        outline = [tuple(vertex * unit) for vertex in np.array(values).reshape(-1, 2)]
        rows, columns = np.nonzero(stencil(thing.shape, thing.size))
        painted = [
            [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]
            for y, x in zip((rows + thing.y).tolist(), (columns + thing.x).tolist(), strict=True)
        ]
        overlaps.append(polygon_iou([outline], painted, scene.width, scene.height))
    # Rounding to 32nds moves each edge by at most 1.25 of 80 pixels: an object of 12 keeps (9.5 / 12)^2 of its area.
    assert min(overlaps) > 0.6
    assert np.mean(overlaps) > 0.85


def test_shapes_differ_clearly_even_when_smallest():
    for first in SHAPES:
        for second in SHAPES:
            assert first == second or (stencil(first, 12) != stencil(second, 12)).mean() > 0.15
