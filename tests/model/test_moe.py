import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baltoro.model.config import NANO
from baltoro.model.moe import MoE

CONFIG = dataclasses.replace(
    NANO.text,
    hidden_size=16,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=2,
    moe_intermediate_size=8,
    routed_scaling_factor=2.5,
)


@pytest.fixture
def moe() -> MoE:
    generator = torch.Generator().manual_seed(0)
    module = MoE(CONFIG).eval().requires_grad_(False)
    for p in module.parameters():
        p.normal_(0, 0.5, generator=generator)
    return module


def _x(tokens: int) -> Tensor:
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))


def _by_token(moe: MoE, x: Tensor) -> Tensor:
    """The definition, one token and one expert at a time."""
    out = []
    for token in x:
        scores = torch.sigmoid(moe.gate.weight @ token)
        ranked = sorted(range(6), key=lambda e: -float(scores[e] + moe.gate.e_score_correction_bias[e]))
        chosen = ranked[:2]
        mass = sum(float(scores[e]) for e in chosen)
        shared = moe.shared_experts
        total = shared.down_proj.weight @ (F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token))
        for e in chosen:
            gate, up, down = (p[e].T for p in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
            total = total + 2.5 * float(scores[e]) / mass * (down @ (F.silu(gate @ token) * (up @ token)))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("tokens", [1, 37])
def test_grouped_experts_equal_a_loop_over_tokens(moe: MoE, tokens: int) -> None:
    x = _x(tokens)
    torch.testing.assert_close(moe(x), _by_token(moe, x), atol=1e-5, rtol=1e-4)


def test_experts_without_tokens(moe: MoE) -> None:
    moe.gate.e_score_correction_bias[:] = torch.tensor([-9.0, 0, -9, 0, 0, -9])
    x = _x(20)
    chosen, _ = moe.gate(x)
    assert set(chosen.flatten().tolist()) == {1, 3, 4}
    torch.testing.assert_close(moe(x), _by_token(moe, x), atol=1e-5, rtol=1e-4)


def test_gradients_reach_experts_and_router_by_the_definition(moe: MoE) -> None:
    x = _x(9)
    moe.requires_grad_(True)
    gradients = torch.autograd.grad(moe(x).square().sum(), [moe.gate.weight, moe.experts.down_proj])
    step = 1e-3
    for p, gradient in zip([moe.gate.weight, moe.experts.down_proj], gradients, strict=True):
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        direction /= direction.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                p += sign * step * direction
                values.append(float(_by_token(moe, x).double().square().sum()))
                p -= sign * step * direction
        assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02)


def test_bias_changes_the_choice_but_not_the_weights(moe: MoE) -> None:
    x = _x(12)
    scores = torch.sigmoid(x @ moe.gate.weight.T)
    moe.gate.e_score_correction_bias[3] = 5.0
    chosen, weights = moe.gate(x)
    assert (chosen == 3).any(-1).all()
    for t in range(12):
        mine = scores[t, chosen[t]]
        torch.testing.assert_close(weights[t], 2.5 * mine / mine.sum())


def test_balance_by_hand(moe: MoE) -> None:
    moe.gate.train()
    moe.gate(_x(12))
    assert float(moe.gate.load.sum()) == 24
    moe.gate.load[:] = torch.tensor([10.0, 2, 3, 4, 1, 4])  # mean 4: signs -1 +1 +1 0 +1 0, their mean 1/3
    moe.gate.e_score_correction_bias[:] = torch.tensor([0.5, 0, 0, 0, 0, 0])
    moe.gate.balance(0.03)
    want = torch.tensor([0.5 - 0.04, 0.02, 0.02, -0.01, 0.02, -0.01])
    torch.testing.assert_close(moe.gate.e_score_correction_bias, want)
    assert not moe.gate.load.any()


def test_evaluation_counts_no_load(moe: MoE) -> None:
    moe.gate(_x(12))
    assert not moe.gate.load.any()
