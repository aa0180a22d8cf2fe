import pytest

from baltoro.rl.shaping import ParlShaping


def test_parl_reward_by_hand() -> None:
    shaping = ParlShaping(lambda_parallel=0.3, lambda_finish=0.2, anneal=0.8)
    signals = {"parallel": 0.5, "finish": 1.0, "perf": 0.25}
    # Of 10 iterations the first 8 anneal: full at 0, half at 4, gone from 8 on.
    assert shaping.reward(signals, 0, 10) == pytest.approx(0.15 + 0.2 + 0.25)
    assert shaping.reward(signals, 4, 10) == pytest.approx(0.075 + 0.1 + 0.25)
    assert shaping.reward(signals, 8, 10) == pytest.approx(0.25)
    assert shaping.reward(signals, 9, 10) == pytest.approx(0.25)
    assert shaping.lambdas(2, 10) == pytest.approx((0.225, 0.15))
