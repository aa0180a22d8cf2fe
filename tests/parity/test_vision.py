"""MoonViT-3D and the whole multimodal model against transformers' `kimi_k25`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baltoro.model.attention import Segments
from baltoro.model.config import ModelConfig, TextConfig, VisionConfig, Yarn
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.vit import Grid, VisionTower

from . import oracle
from .oracle import DTYPES, TOLERANCE

# The oracle's position table must be square.
VISION = VisionConfig(
    patch_size=3,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    intermediate_size=28,
    pos_emb_height=6,
    pos_emb_width=6,
)
TEXT = TextConfig(
    vocab_size=40,
    hidden_size=20,
    num_layers=2,
    num_heads=2,
    q_lora_rank=14,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=10,
    intermediate_size=30,
    first_k_dense=1,
    n_routed_experts=5,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=12,
    routed_scaling_factor=2.446,
    rope_theta=1000.0,
    yarn=Yarn(factor=4.0, original_max_position=16),
)
PAD = 7

# Grids (1, 6, 6) and (3, 6, 6) take the table as it is, the others interpolate it, up and down.
GRIDS: list[Grid] = [(1, 4, 10), (3, 6, 6), (1, 6, 6), (2, 2, 8), (1, 2, 2), (4, 14, 4), (1, 4, 10), (4, 6, 2)]


def _patches(grids: list[Grid], dtype: torch.dtype, seed: int) -> Tensor:
    shape = (sum(t * h * w for t, h, w in grids), 3, VISION.patch_size, VISION.patch_size)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _compare_towers(grids: list[Grid], dtype: torch.dtype, seed: int) -> None:
    ours = VisionTower(VISION).to(dtype)
    oracle.randomise(ours, seed)
    theirs = oracle.vision_oracle(ours, VISION, dtype)
    ours_in, theirs_in = (_patches(grids, dtype, seed + 1).requires_grad_() for _ in range(2))
    ours_out = ours(ours_in, grids)
    cotangent = torch.randn(ours_out.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 2))
    (ours_out * cotangent).sum().backward()
    with oracle.precision(dtype):
        theirs_out = theirs(theirs_in, grid_thw=torch.tensor(grids)).pooler_output
        (theirs_out * cotangent).sum().backward()
    got = oracle.to_oracle(oracle.gradients(ours), VISION.num_heads)
    got |= {"features": ours_out, "patches": oracle.gradient(ours_in)}
    want = oracle.gradients(theirs) | {"features": theirs_out, "patches": oracle.gradient(theirs_in)}
    oracle.assert_equal(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tower_on_images_and_clips(dtype: torch.dtype) -> None:
    _compare_towers(GRIDS, dtype, seed=0)


_SIDE = st.integers(1, 8).map(lambda n: 2 * n)


@settings(max_examples=20)
@given(grids=st.lists(st.tuples(st.integers(1, 4), _SIDE, _SIDE), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_tower_on_any_grids(grids: list[Grid], seed: int) -> None:
    _compare_towers(grids, torch.float64, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spliced_sequences(dtype: torch.dtype) -> None:
    """Packed documents with images, clips, both mixed, and none, from patches and tokens to logits and back."""
    config = ModelConfig(TEXT, VISION)
    ours = KimiK25(config, PAD, dtype).to(dtype).train()
    oracle.randomise(ours, 1)
    theirs = oracle.multimodal_oracle(ours, config, PAD, dtype)
    our_routes, their_routes = oracle.Routes(ours), oracle.Routes(theirs)
    generator = torch.Generator().manual_seed(2)
    documents: list[list[Grid]] = [[(1, 4, 10), (3, 6, 6), (1, 6, 6), (2, 2, 8)], [], [(1, 2, 2)], [(4, 14, 4)]]
    ids: list[Tensor] = []
    for media in documents:
        parts = [torch.randint(8, TEXT.vocab_size, (3,), generator=generator)]
        for _, h, w in media:
            parts += [torch.full((h * w // 4,), PAD), torch.randint(8, TEXT.vocab_size, (2,), generator=generator)]
        ids.append(torch.cat(parts))
    grids = [grid for media in documents for grid in media]
    lengths = [len(x) for x in ids]
    cotangent = torch.randn(sum(lengths), TEXT.vocab_size, dtype=dtype, generator=generator)
    ours_in, theirs_in = (_patches(grids, dtype, 3).requires_grad_() for _ in range(2))

    ours_out = ours.logits(ours(Batch(torch.cat(ids), Segments(lengths), ours_in, grids)))
    (ours_out * cotangent).sum().backward()
    outputs: list[Tensor] = []
    items = iter(theirs_in.split([t * h * w for t, h, w in grids]))
    with oracle.precision(dtype):
        for tokens, media in zip(ids, documents, strict=True):
            outputs.append(theirs(**oracle.multimodal_inputs(theirs.config, tokens, media, items)).logits[0])
        theirs_out = torch.cat(outputs)
        (theirs_out * cotangent).sum().backward()

    for mine, yours in zip(our_routes, their_routes, strict=True):
        assert torch.equal(mine, yours)
    got = oracle.to_oracle(oracle.gradients(ours), VISION.num_heads)
    got |= {"logits": ours_out, "patches": oracle.gradient(ours_in)}
    want = oracle.gradients(theirs) | {"logits": theirs_out, "patches": oracle.gradient(theirs_in)}
    oracle.assert_equal(got, want, TOLERANCE[dtype])
