import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baltoro.score.polygons import Vertex, polygon_iou

ALL = [(0, 0), (100, 0), (100, 100), (0, 100)]
LEFT = [(0, 0), (50, 0), (50, 100), (0, 100)]
RIGHT = [(50, 0), (100, 0), (100, 100), (50, 100)]


def test_half_and_union_of_halves():
    assert polygon_iou([LEFT], [ALL], 100, 100) == pytest.approx(0.5)
    assert polygon_iou([LEFT, RIGHT], [ALL], 100, 100) == pytest.approx(1)
    assert polygon_iou([LEFT], [RIGHT], 100, 100) == 0
    assert polygon_iou([LEFT, LEFT], [ALL], 100, 100) == pytest.approx(0.5)


def test_a_bow_tie_has_both_its_wings():
    # Its even-odd area is half of the square; shapely gives 0, or a quarter after buffer(0).
    assert polygon_iou([[(0, 0), (100, 100), (100, 0), (0, 100)]], [ALL], 100, 100) == pytest.approx(0.5, abs=0.02)


def test_what_lies_outside_is_clipped():
    assert polygon_iou([[(-400, -400), (900, -400), (900, 900), (-400, 900)]], [ALL], 100, 100) == pytest.approx(1)
    # The half plane x + y <= 100 cuts the picture along its diagonal, however far away the corners are.
    assert polygon_iou([[(-900, -900), (1000, -900), (-900, 1000)]], [ALL], 100, 100) == pytest.approx(0.5, abs=0.02)
    assert polygon_iou([[(200, 200), (300, 200), (300, 300)]], [ALL], 100, 100) == 0


def test_far_corners_cost_no_memory():
    # The rasteriser walks outlines pixel by pixel: without clipping, this one would take some tens of gigabytes.
    far = 9e8
    assert polygon_iou([[(-far, -far), (far + 100, -far), (-far, far + 100)]], [ALL], 100, 100) == pytest.approx(
        0.5, abs=0.02
    )


@pytest.mark.parametrize(
    "useless",
    [[], [(1, 1), (50, 50)], [(0, 0), (100, 0), (float("nan"), 100)], [(0, 0), (float("inf"), 0), (0, 1)], ALL * 201],
)
def test_invalid_polygons_are_ignored(useless: list[Vertex]):
    assert polygon_iou([useless], [ALL], 100, 100) == 0
    assert polygon_iou([useless, LEFT], [ALL], 100, 100) == pytest.approx(0.5)


def inside(polygon: list[Vertex], size: int) -> np.ndarray:
    """Even-odd rule at 4 x 4 samples per pixel."""
    centres = (np.arange(4 * size) + 0.5) / 4
    across, down = np.meshgrid(centres, centres)
    odd = np.zeros_like(across, dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if y0 != y1:
            odd ^= ((y0 > down) != (y1 > down)) & (across < x0 + (down - y0) * (x1 - x0) / (y1 - y0))
    return odd


vertices = st.tuples(st.integers(-60, 160), st.integers(-60, 160))


@settings(max_examples=60)
@given(st.lists(vertices, min_size=3, max_size=6))
def test_agrees_with_sampling(polygon: list[Vertex]):
    share = inside(polygon, 100).mean()
    # The rasteriser rounds outlines to pixels, so thin slivers differ by about a pixel along their length.
    assert polygon_iou([polygon], [ALL], 100, 100) == pytest.approx(share, abs=0.03)
