"""Polygon reward: rasterise both sides with pycocotools, IoU of the masks (report section 4.4.2).

Both sides go through the same rasteriser because two rasterisers disagree by up to 0.1 IoU on small objects; shapely is
no choice at all, it gives self-intersecting output the wrong area.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from pycocotools import mask

Vertex = tuple[float, float]
Polygon = Sequence[Vertex]

MAX_VERTICES = 512

_coco = cast(Any, mask)  # its stubs miss lists of polygons


def polygon_iou(predicted: Sequence[Polygon], target: Sequence[Polygon], width: int, height: int) -> float:
    """IoU of the unions of the polygons on a width x height raster, vertices in pixels, parts outside clipped.

    Predicted polygons of fewer than 3 or more than MAX_VERTICES vertices or with one at no sane place are ignored.
    Even-odd filling, so self-intersection is legal. Nothing valid predicted is 0.
    """
    found = _mask(predicted, width, height)
    if found is None:
        return 0.0
    gold = _mask(target, width, height)
    assert gold is not None, "the target has no polygon inside the image"
    return float(_coco.iou([found], [gold], [0])[0][0])


def _mask(polygons: Sequence[Polygon], width: int, height: int) -> object:
    """Run-length mask of the union; None if no polygon is usable."""
    clipped = [_clip(polygon, width, height) for polygon in polygons if _is_polygon(polygon)]
    flat = [[float(value) for vertex in polygon for value in vertex] for polygon in clipped if len(polygon) >= 3]
    return _coco.merge(_coco.frPyObjects(flat, height, width)) if flat else None


def _is_polygon(polygon: Polygon) -> bool:
    # The bound also turns NaN away, and keeps the clipping's differences finite.
    return 3 <= len(polygon) <= MAX_VERTICES and all(abs(value) <= 1e9 for vertex in polygon for value in vertex)


def _clip(polygon: Polygon, width: int, height: int) -> list[Vertex]:
    """Sutherland-Hodgman against the image's four edges. The rasteriser clips too, but walks all of the outline."""
    vertices = list(polygon)
    edges: list[tuple[int, float, Callable[[float, float], bool]]] = [
        (0, 0.0, float.__ge__),
        (0, float(width), float.__le__),
        (1, 0.0, float.__ge__),
        (1, float(height), float.__le__),
    ]
    for axis, bound, inside in edges:
        kept: list[Vertex] = []
        for start, end in zip(vertices[-1:] + vertices[:-1], vertices, strict=True):
            start_in, end_in = inside(float(start[axis]), bound), inside(float(end[axis]), bound)
            if start_in != end_in:
                share = (bound - start[axis]) / (end[axis] - start[axis])
                other = start[1 - axis] + share * (end[1 - axis] - start[1 - axis])
                kept.append((bound, other) if axis == 0 else (other, bound))
            if end_in:
                kept.append(end)
        vertices = kept
    return vertices
