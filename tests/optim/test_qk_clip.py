import pytest
import torch
from torch import Tensor

from baltoro.optim.qk_clip import qk_clip

HEADS, NOPE, ROPE, V, DIM, RANK, TOKENS = 4, 6, 4, 5, 10, 7, 30


def _logits(q_weight: Tensor, kv_weight: Tensor, x: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
    """Largest visible logit of every head at scale 1 (positions all 0, so that rope does not turn)."""
    q = (x @ q_weight.T).view(TOKENS, HEADS, NOPE + ROPE)
    k = (latent @ kv_weight.T).view(TOKENS, HEADS, NOPE + V)[..., :NOPE]
    scores = torch.einsum("ihd,jhd->hij", q[..., :NOPE], k) + torch.einsum("ihd,jd->hij", q[..., NOPE:], k_rope)
    return scores.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), float("-inf")).amax((1, 2))


def test_clipped_heads_end_at_the_threshold_and_others_are_untouched() -> None:
    generator = torch.Generator().manual_seed(0)
    q, kv, x, latent, k_rope = (
        torch.randn(*shape, generator=generator)
        for shape in (
            (HEADS * (NOPE + ROPE), DIM),
            (HEADS * (NOPE + V), RANK),
            (TOKENS, DIM),
            (TOKENS, RANK),
            (TOKENS, ROPE),
        )
    )
    q.view(HEADS, -1, DIM)[1] *= 8
    q.view(HEADS, -1, DIM)[3] *= 3
    before = _logits(q, kv, x, latent, k_rope)
    threshold = float(before[[0, 2]].max()) * 1.5
    assert int((before > threshold).sum()) == 2
    old_q, old_kv, record = q.clone(), kv.clone(), before.clone()
    assert qk_clip(q, kv, record, NOPE, ROPE, V, threshold) == 2
    after = _logits(q, kv, x, latent, k_rope)
    assert bool((after <= threshold * (1 + 1e-5)).all())
    torch.testing.assert_close(after[[1, 3]], torch.full((2,), threshold), rtol=1e-5, atol=0)
    for head in (0, 2):
        assert torch.equal(q.view(HEADS, -1, DIM)[head], old_q.view(HEADS, -1, DIM)[head])
    values = kv.view(HEADS, NOPE + V, RANK)[:, NOPE:]
    assert torch.equal(values, old_kv.view(HEADS, NOPE + V, RANK)[:, NOPE:])
    assert torch.equal(kv.view(HEADS, -1, RANK)[[0, 2]], old_kv.view(HEADS, -1, RANK)[[0, 2]])
    assert bool((record == float("-inf")).all())


def test_factors_by_hand() -> None:
    # One head at S = 400 with threshold 100: gamma = 1/4, so nope rows take 1/2 and rope query rows 1/4.
    q, kv = torch.ones(3, 2), torch.ones(4, 2)
    assert qk_clip(q, kv, torch.tensor([400.0]), nope=2, rope=1, v=2) == 1
    assert q[:, 0].tolist() == pytest.approx([0.5, 0.5, 0.25])
    assert kv[:, 0].tolist() == pytest.approx([0.5, 0.5, 1, 1])


@pytest.mark.parametrize("largest", [100.0, -5.0, float("-inf")])
def test_at_or_below_the_threshold_nothing_happens(largest: float) -> None:
    q, kv = torch.ones(3, 2), torch.ones(4, 2)
    assert qk_clip(q, kv, torch.tensor([largest]), nope=2, rope=1, v=2) == 0
    assert bool((q == 1).all())
    assert bool((kv == 1).all())
