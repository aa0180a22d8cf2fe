import pytest

from baltoro.optim.schedule import wsd


def test_wsd_by_hand() -> None:
    # 4 warm-up steps, constant, then 4 steps from 1 to 0.2 along half a cosine.
    got = [wsd(step, total=12, warmup=4, decay=4, floor=0.2) for step in range(12)]
    root = 0.5**0.5
    want = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.6 + 0.4 * root, 0.6, 0.6 - 0.4 * root]
    assert got == pytest.approx(want)


def test_without_decay_it_stays() -> None:
    assert [wsd(step, total=5, warmup=0, decay=0) for step in range(5)] == [1.0] * 5
