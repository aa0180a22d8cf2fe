import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.score.grounding import Box, box_f1, iou, soft_f1

SQUARE: Box = (0, 0, 2, 2)
corner = st.integers(0, 20)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, st.integers(1, 9), st.integers(1, 9))


def test_iou_by_hand():
    assert iou(SQUARE, (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou(SQUARE, (2, 0, 4, 2)) == 0  # they share an edge only


def test_boxes_in_unit_coordinates_count():
    # An overlap less than one unit wide is no overlap in some public rewards, which then give 0 for all such boxes.
    assert box_f1([(0.1, 0.1, 0.4, 0.3)], [(0.1, 0.1, 0.4, 0.3)]) == pytest.approx(1)


def test_assignment_is_optimal_not_greedy():
    # Greedy takes 0.9 and is left with 0.1; the best matching is 0.8 + 0.85.
    assert soft_f1(np.array([[0.9, 0.8], [0.85, 0.1]]), 2, 2) == pytest.approx(1.65 / 2)


def test_duplicates_and_malformed_boxes_cost_precision():
    assert box_f1([SQUARE, SQUARE], [SQUARE]) == pytest.approx(2 / 3)
    for bad in [(2, 2, 0, 0), (0, 0, 0, 2), (float("nan"), 0, 2, 2), (0, 0, float("inf"), 2)]:
        assert box_f1([bad, SQUARE], [SQUARE]) == pytest.approx(2 / 3)
        assert box_f1([bad], [SQUARE]) == 0


def test_empty_sides():
    assert box_f1([], []) == 1
    assert box_f1([SQUARE], []) == 0
    assert box_f1([], [SQUARE]) == 0


def test_a_flood_of_boxes_pays_for_every_one():
    assert box_f1([SQUARE] * 5000, [SQUARE]) == pytest.approx(2 / 5001)


@given(st.lists(boxes, min_size=1, max_size=4), st.lists(boxes, min_size=1, max_size=4))
def test_equals_the_best_of_all_matchings(predicted: list[Box], target: list[Box]):
    short, long = sorted((predicted, target), key=len)
    best = max(
        sum(iou(a, b) for a, b in zip(short, chosen, strict=True))
        for chosen in itertools.permutations(long, len(short))
    )
    assert box_f1(predicted, target) == pytest.approx(2 * best / (len(predicted) + len(target)))
    assert box_f1(predicted, target) == pytest.approx(box_f1(target, predicted))
