import pytest

from baltoro.score.counting import count_score


@pytest.mark.parametrize(
    ("predicted", "target", "score"),
    [
        (4, 4, 1),
        (3, 4, 0.75),
        (5, 4, 0.75),
        (8, 4, 0),
        (99, 4, 0),
        (0, 0, 1),
        (1, 0, 0),
        (0, 3, 0),
        (-1, 2, 0),
        (-1, 0, 0),
    ],
)
def test_by_hand(predicted: int, target: int, score: float):
    assert count_score(predicted, target) == pytest.approx(score)
