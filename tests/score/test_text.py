import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.score.text import edit_similarity


@pytest.mark.parametrize(
    ("predicted", "target", "similarity"),
    [
        ("kitten", "sitting", 4 / 7),  # three edits
        ("", "", 1),
        ("", "abc", 0),
        ("abc", "xyz", 0),
        ("  bal \n  cor ", "bal cor", 1),
        ("balcor", "bal cor", 6 / 7),
        ("ﬁn", "fin", 1),  # the ligature is one character before NFKC
        ("Bal", "bal", 2 / 3),  # case is not folded
    ],
)
def test_by_hand(predicted: str, target: str, similarity: float):
    assert edit_similarity(predicted, target) == pytest.approx(similarity)


@given(st.text(max_size=12), st.text(max_size=12))
def test_symmetric_and_one_on_itself(a: str, b: str):
    assert edit_similarity(a, a) == 1
    assert edit_similarity(a, b) == pytest.approx(edit_similarity(b, a))
    assert 0 <= edit_similarity(a, b) <= 1
