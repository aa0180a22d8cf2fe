"""Where transformers 5.24 is wrong or goes its own way. A test that fails on a newer version means that `oracle.py` can
be made simpler."""

import ast
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import DeepseekV3ForCausalLM, Kimi_K25Config
from transformers.core_model_loading import PermuteForRope
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from baltoro.chat.media import MediaSpec, preprocess_image
from baltoro.chat.messages import Image
from baltoro.model.config import K25, TextConfig, VisionConfig, Yarn
from baltoro.model.decoder import CausalLM
from baltoro.model.layers import RMSNorm
from baltoro.model.vit import Grid, VisionTower

from . import oracle

TEXT = TextConfig(
    vocab_size=30,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=6,
    intermediate_size=20,
    first_k_dense=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=8,
    routed_scaling_factor=2.0,
    yarn=Yarn(factor=4.0, original_max_position=16),
)
VISION = VisionConfig(
    patch_size=2,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=20,
    pos_emb_height=4,
    pos_emb_width=4,
)


@pytest.mark.parametrize(("name", "theirs"), [("q_a_layernorm", 1e-6), ("kv_a_layernorm", 1e-6), (None, 1e-5)])
def test_norms_inside_attention_ignore_the_configured_epsilon(name: str | None, theirs: float) -> None:
    """transformers issue 44261. A vector of 0.002 throughout is 0.002 / sqrt(4e-6 + epsilon) after a norm."""
    assert K25.text.rms_norm_eps == TEXT.rms_norm_eps == 1e-5
    path = "model.layers.0.input_layernorm" if name is None else f"model.layers.0.self_attn.{name}"
    for model, eps in ((CausalLM(TEXT), 1e-5), (DeepseekV3ForCausalLM(oracle.text_config(TEXT)), theirs)):
        norm = model.get_submodule(path)
        assert isinstance(norm, RMSNorm | DeepseekV3RMSNorm)
        x = torch.full(norm.weight.shape, 0.002)
        assert float(norm(x).detach()[0]) == pytest.approx(0.002 / math.sqrt(4e-6 + eps), rel=1e-5)


def test_float64_is_float32_in_places() -> None:
    ours = CausalLM(TEXT).double()
    oracle.randomise(ours, 0)
    theirs = oracle.text_oracle(ours, TEXT, torch.float64)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        plain = theirs(ids, use_cache=False).logits
        with oracle.precision(torch.float64):
            widened = theirs(ids, use_cache=False).logits
    assert 1e-9 < float((plain - widened).norm() / widened.norm()) < 1e-5


def test_channels_of_q_and_k_are_reordered_in_the_vision_tower() -> None:
    """By the rule with which transformers converts the released weights, and nothing less will do."""
    x = torch.arange(16.0)
    rule = PermuteForRope()._permute_for_rope(x, dataclasses.make_dataclass("Heads", ["num_attention_heads"])(2))
    assert rule.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(oracle.halves(x, 2), rule)

    ours = VisionTower(VISION).requires_grad_(False)
    oracle.randomise(ours, 0)
    theirs = oracle.vision_oracle(ours, VISION, torch.float32).requires_grad_(False)
    grids: list[Grid] = [(1, 4, 6)]
    patches = torch.randn(24, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    q, k, _ = ours.state_dict()["encoder.blocks.0.wqkv.weight"].chunk(3)
    theirs.load_state_dict({"layers.0.attn.q_proj.weight": q, "layers.0.attn.k_proj.weight": k}, strict=False)
    got = theirs(patches, grid_thw=torch.tensor(grids)).pooler_output
    want = ours(patches, grids)
    assert float((got - want).norm() / want.norm()) > 1e-3


def test_embeddings_are_tied_and_video_has_its_own_token_by_default() -> None:
    config = Kimi_K25Config()
    assert config.tie_word_embeddings
    assert config.video_token_id == K25.text.vocab_size  # no token of the release: its placeholder serves both


def test_pictures_are_no_longer_transposed() -> None:
    """The first versions of the processor gave (height, width) to navit_resize(width, height); 5.24 has it right. By
    hand, for 300 rows of 700 pixels and 200 patches: 50 * 21 = 1050 patches, scale sqrt(200 / 1050) = 0.4364, 130 rows
    of 305, padded to 140 of 308.

    The module needs torchvision, which is not installed here, so its pure function is taken from the source."""
    path = Path(transformers.__file__).parent / "models/kimi_k25/image_processing_kimi_k25.py"
    source = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", None) == "navit_resize")
    names: dict[str, object] = {"math": math}
    exec(compile(ast.Module([source], []), path, "exec"), names)
    resize = names["navit_resize"]
    assert callable(resize)
    assert resize(300, 700, 14, 2, 200, 512) == ((130, 305), (140, 308))

    pixels = np.full((300, 700, 3), 255, np.uint8)
    item = preprocess_image(Image(pixels), dataclasses.replace(MediaSpec.K25, patch_limit=200))
    assert item.grid_thw == (1, 140 // 14, 308 // 14)
    plane = item.patches.reshape(10, 22, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 140, 308)
    want = np.full((3, 140, 308), -1.0)
    want[:, :130, :305] = 1.0
    np.testing.assert_array_equal(plane, want)
