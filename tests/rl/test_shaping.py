import pytest

from baltoro.rl.shaping import ParlShaping


def test_parl_weights_by_hand() -> None:
    """Of 10 iterations the first 8 anneal: full at 0, half at 4, gone from 8 on."""
    shaping = ParlShaping(lambda_parallel=0.3, lambda_finish=0.2, anneal=0.8)
    for iteration, parallel, finish in ((0, 0.3, 0.2), (4, 0.15, 0.1), (8, 0.0, 0.0), (9, 0.0, 0.0)):
        weights = {"parallel": parallel, "finish": finish, "perf": 1.0}
        assert shaping.weights(iteration, 10) == pytest.approx(weights)
    assert shaping.lambdas(2, 10) == pytest.approx((0.225, 0.15))
