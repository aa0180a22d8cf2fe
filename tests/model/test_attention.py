"""Packed and cached attention against plain attention written here."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baltoro.model.attention import CachePlan
from baltoro.model.config import NANO, TextConfig, Yarn
from baltoro.model.decoder import Decoder
from baltoro.model.packed import Segments, segment_attention

SMALL = dataclasses.replace(
    NANO.text,
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=48,
    moe_intermediate_size=16,
    routed_scaling_factor=1.5,
    yarn=Yarn(factor=4.0, original_max_position=16),
)


def _decoder(config: TextConfig, seed: int = 0) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config).eval().requires_grad_(False)
    for p in decoder.parameters():
        p.normal_(0, 0.3 if p.dim() > 1 else 1.0, generator=generator)
    return decoder


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One document in float64, row by row: outputs [T, H, V] and the largest visible logit [H]."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=torch.float64)
    top = torch.full((q.shape[1],), float("-inf"), dtype=torch.float64)
    for i in range(len(q)):
        end = i + 1 if causal else len(k)
        for h in range(q.shape[1]):
            logits = scale * (k[:end, h] @ q[i, h])
            top[h] = max(top[h], logits.max())
            out[i, h] = torch.softmax(logits, 0) @ v[:end, h]
    return out, top


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[1], [3, 40, 5, 5, 1, 22], [30, 30, 31], [2, 300]])
def test_segments_attend_within_themselves(lengths: list[int], causal: bool) -> None:
    total = sum(lengths)
    q, k, v = _randn(1, total, 2, 6), _randn(2, total, 2, 6), _randn(3, total, 2, 4 if causal else 6)
    top = torch.full((2,), float("-inf")) if causal else None
    got = segment_attention(q, k, v, Segments(lengths), causal=causal, scale=0.7, max_logits=top)
    parts = [_plain(*x, causal, 0.7) for x in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)]
    torch.testing.assert_close(got.double(), torch.cat([out for out, _ in parts]), atol=2e-6, rtol=1e-5)
    if top is not None:
        torch.testing.assert_close(top.double(), torch.stack([m for _, m in parts]).amax(0), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.booleans(), st.integers(0, 99))
def test_gradients_are_those_of_the_plain_formula(lengths: list[int], causal: bool, seed: int) -> None:
    """In float64, by autograd through softmax(q k^T) v with one mask over everything."""
    total = sum(lengths)
    widths = (6, 6, 4 if causal else 6)
    inputs = [_randn(seed + i, total, 2, width).double().requires_grad_() for i, width in enumerate(widths)]
    weight = _randn(seed + 9, total, 2, widths[2]).double()
    q, k, v = inputs
    out = segment_attention(q, k, v, Segments(lengths), causal=causal, scale=0.7)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    owner = torch.repeat_interleave(torch.tensor(lengths))
    hidden = owner[:, None] != owner
    if causal:
        hidden |= torch.ones(total, total, dtype=torch.bool).triu(1)
    logits = torch.einsum("ihd,jhd->hij", inputs[0], inputs[1]) * 0.7
    plain = torch.einsum("hij,jhv->ihv", logits.masked_fill(hidden, float("-inf")).softmax(-1), inputs[2])
    for got, wanted in zip(ours, torch.autograd.grad((plain * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_wide_segments_agree_with_narrow_arithmetic(causal: bool) -> None:
    lengths = [1030, 1100]
    q, k, v = _randn(1, 2130, 1, 4), _randn(2, 2130, 1, 4), _randn(3, 2130, 1, 4)
    top = torch.full((1,), float("-inf")) if causal else None
    got = segment_attention(q, k, v, Segments(lengths), causal=causal, scale=1.0, max_logits=top)
    largest = float("-inf")
    for out, *parts in zip(got.split(lengths), *(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = (parts[0][:, 0] @ parts[1][:, 0].T).double()
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        largest = max(largest, float(scores.max()))
        want = torch.softmax(scores, -1) @ parts[2][:, 0].double()
        torch.testing.assert_close(out[:, 0].double(), want, atol=1e-5, rtol=1e-4)
    if top is not None:
        assert float(top) == pytest.approx(largest, abs=1e-5)


def test_documents_of_a_pack_never_see_each_other() -> None:
    decoder = _decoder(SMALL)
    lengths = [7, 19, 3, 19]
    x = _randn(4, sum(lengths), SMALL.hidden_size)
    before = decoder(x, Segments(lengths)).split(lengths)
    changed = x.clone()
    changed[7:26] = _randn(5, 19, SMALL.hidden_size) * 3
    after = decoder(changed, Segments(lengths)).split(lengths)
    for document in (0, 2, 3):
        torch.testing.assert_close(after[document], before[document], atol=1e-6, rtol=0)
        start = sum(lengths[:document])
        alone = decoder(x[start : start + lengths[document]], Segments([lengths[document]]))
        torch.testing.assert_close(alone, before[document], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(after[1], before[1], atol=1e-2)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    lora=st.booleans(),
)
def test_cached_chunks_equal_the_full_forward(lengths: list[int], seed: int, lora: bool) -> None:
    """Sequences advance by chunks of arbitrary sizes, some waiting while others go on, through one absorbed cache."""
    config = SMALL if lora else dataclasses.replace(SMALL, q_lora_rank=None)
    decoder = _decoder(config, seed)
    x = _randn(seed, sum(lengths), config.hidden_size)
    full = decoder(x, Segments(lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rng = random.Random(seed)
    page = rng.choice([1, 3, 16])
    tables = torch.tensor(rng.sample(range(200), 5 * (-(-40 // page)) if page > 1 else 200)).view(5, -1)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    # Old contents of a page must not matter, so the cache begins as noise.
    cache = [_randn(seed + i, 200, page, width) for i in range(config.num_layers)]
    done = [0] * len(lengths)
    got = torch.full_like(full, float("nan"))
    while done != lengths:
        going = [i for i in range(len(lengths)) if done[i] < lengths[i] and rng.random() < 0.8]
        rng.shuffle(going)
        if not going:
            continue
        spans = [(i, done[i], rng.randint(done[i] + 1, min(lengths[i], done[i] + 12))) for i in going]
        new = torch.cat([torch.arange(starts[i] + a, starts[i] + b) for i, a, b in spans])
        plan = CachePlan([(a, b) for _, a, b in spans], tables[[i for i, _, _ in spans]], page, config, x.device)
        got[new] = decoder.extend(x[new], cache, plan)
        for i, _, b in spans:
            done[i] = b
    torch.testing.assert_close(got, full, atol=5e-5, rtol=1e-4)
