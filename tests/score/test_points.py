import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.score.points import Point, point_f1

SIZE = (30, 40)  # the diagonal is 50, so sigma is 2.5
points = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=4)


def test_one_and_two_sigma():
    assert point_f1([(10, 12.5)], [(10, 10)], SIZE) == pytest.approx(math.exp(-0.5))
    assert point_f1([(13, 14)], [(10, 10)], SIZE) == pytest.approx(math.exp(-2))


def test_pairs_are_matched_whatever_their_order():
    assert point_f1([(20, 30), (5, 5)], [(5, 5), (20, 30)], SIZE) == pytest.approx(1)


def test_extra_missing_and_non_finite_points():
    assert point_f1([(5, 5), (5, 5)], [(5, 5)], SIZE) == pytest.approx(2 / 3)
    assert point_f1([(5, 5), (math.nan, 5)], [(5, 5)], SIZE) == pytest.approx(2 / 3)
    assert point_f1([(math.inf, 0)], [(5, 5)], SIZE) == 0
    assert point_f1([], [], SIZE) == 1
    assert point_f1([], [(5, 5)], SIZE) == 0
    assert point_f1([(5, 5)], [], SIZE) == 0


@given(points, points, st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_the_picture_changes_nothing(predicted: list[Point], target: list[Point], scale: float):
    def scaled(several: list[Point]) -> list[Point]:
        return [(x * scale, y * scale) for x, y in several]

    expected = point_f1(predicted, target, SIZE)
    assert point_f1(scaled(predicted), scaled(target), (30 * scale, 40 * scale)) == pytest.approx(expected)
