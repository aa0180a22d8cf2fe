import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baltoro.rl.objective import ObjectiveConfig, group_advantages, policy_loss

CONFIG = ObjectiveConfig(alpha=0.5, beta=2.0, tau=0.1)


def _gradient(policy: Tensor, engine: Tensor, advantages: Tensor, total: int, config: ObjectiveConfig) -> Tensor:
    policy = policy.clone().requires_grad_(True)
    policy_loss(policy, engine, advantages, total, config).loss.backward()
    assert policy.grad is not None
    return policy.grad


def test_three_tokens_by_hand() -> None:
    engine = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    policy = engine + torch.tensor([1.5, 4.0, 0.25], dtype=torch.float64).log()
    advantages = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    # Ratios 1.5, 4 -> 2, 1/4 -> 1/2; the batch has a fourth token elsewhere, so N = 4.
    square, far = math.log(1.5) ** 2, math.log(4) ** 2
    result = policy_loss(policy, engine, advantages, 4, CONFIG)
    assert float(result.loss) == pytest.approx(-(1.5 + 4 - 0.5 - 0.1 * (square + 2 * far)) / 4)
    assert result.outside == pytest.approx(2 / 3)
    assert result.mismatch == pytest.approx((math.log(1.5) + 2 * math.log(4)) / 3)
    # Inside: -(ratio A - 2 tau d)/N. Outside only tau is left, pulling the policy back.
    want = [-(1.5 - 0.2 * math.log(1.5)) / 4, 0.2 * math.log(4) / 4, -0.2 * math.log(4) / 4]
    assert _gradient(policy, engine, advantages, 4, CONFIG).tolist() == pytest.approx(want)


@given(
    st.lists(
        st.tuples(st.floats(-2.5, 2.5), st.floats(-3, 3)).filter(lambda p: abs(abs(p[0]) - math.log(2)) > 1e-3),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 0.5),
)
def test_gradient_is_that_of_eq_1(tokens: list[tuple[float, float]], tau: float) -> None:
    """Central differences of Eq. 1 written here: Clip(ratio, alpha, beta) * A - tau * log(ratio)^2, over N."""
    config = ObjectiveConfig(0.5, 2.0, tau)

    def objective(values: list[float]) -> float:
        gain = sum(min(max(math.exp(d), 0.5), 2.0) * a - tau * d * d for d, (_, a) in zip(values, tokens, strict=True))
        return gain / 10

    ratios = [d for d, _ in tokens]
    engine = torch.full((len(tokens),), -2.0, dtype=torch.float64)
    advantages = torch.tensor([a for _, a in tokens], dtype=torch.float64)
    got = _gradient(engine + torch.tensor(ratios, dtype=torch.float64), engine, advantages, 10, config)
    for i in range(len(tokens)):
        up, down = ([d + s * 1e-6 * (i == j) for j, d in enumerate(ratios)] for s in (1, -1))
        assert float(got[i]) == pytest.approx(-(objective(up) - objective(down)) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("log_ratio", [math.log(2) + 0.01, 3.0, 120.0, math.log(0.5) - 0.01, -3.0, -120.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_outside_the_window_only_tau_acts_whatever_the_advantage(log_ratio: float, advantage: float) -> None:
    """PPO would keep two of these four sides; Eq. 1 keeps none. 120 would overflow an unguarded float32 ratio."""
    engine = torch.tensor([-130.0])
    gradient = _gradient(engine + log_ratio, engine, torch.tensor([advantage]), 1, ObjectiveConfig(tau=0.0))
    assert float(gradient) == 0.0
    gradient = _gradient(engine + log_ratio, engine, torch.tensor([advantage]), 1, CONFIG)
    assert float(gradient) == pytest.approx(2 * 0.1 * log_ratio, rel=1e-4)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_inside_the_window_both_signs_count(advantage: float) -> None:
    gradient = _gradient(
        torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([advantage]), 1, ObjectiveConfig(tau=0.0)
    )
    assert float(gradient) == pytest.approx(-advantage * math.exp(0.5), rel=1e-5)


def test_group_advantages_by_hand() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([0.1, 0.1]) == [0.0, 0.0]
    # No division by the deviation: spread stays.
    assert group_advantages([0.0, 10.0]) == [-5.0, 5.0]
