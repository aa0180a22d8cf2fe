"""The layout against what is published of Kimi-K2.5: tensors, shards and their size in bytes (model.md 2, 8)."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from baltoro.model.config import K25, NANO
from baltoro.model.kimi import KimiK25
from baltoro.model.layout import Released, shapes, shards, weights
from baltoro.model.shards import Stored, header

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32


def _published() -> Iterator[tuple[str, Stored]]:
    """The table of the released tensors, written out by hand."""
    head = "language_model."
    yield head + "lm_head.weight", Stored(BF16, (163840, 7168))
    yield head + "model.embed_tokens.weight", Stored(BF16, (163840, 7168))
    yield head + "model.norm.weight", Stored(BF16, (7168,))
    attention = {
        "q_a_proj": (1536, 7168),
        "q_a_layernorm": (1536,),
        "q_b_proj": (12288, 1536),
        "kv_a_proj_with_mqa": (576, 7168),
        "kv_a_layernorm": (512,),
        "kv_b_proj": (16384, 512),
        "o_proj": (7168, 8192),
    }
    for i in range(61):
        layer = f"{head}model.layers.{i}."
        yield layer + "input_layernorm.weight", Stored(BF16, (7168,))
        yield layer + "post_attention_layernorm.weight", Stored(BF16, (7168,))
        for name, shape in attention.items():
            yield f"{layer}self_attn.{name}.weight", Stored(BF16, shape)
        mlp, hidden = (layer + "mlp.", 18432) if i == 0 else (layer + "mlp.shared_experts.", 2048)
        yield mlp + "gate_proj.weight", Stored(BF16, (hidden, 7168))
        yield mlp + "up_proj.weight", Stored(BF16, (hidden, 7168))
        yield mlp + "down_proj.weight", Stored(BF16, (7168, hidden))
        if i == 0:
            continue
        yield layer + "mlp.gate.weight", Stored(BF16, (384, 7168))
        yield layer + "mlp.gate.e_score_correction_bias", Stored(F32, (384,))
        for expert in range(384):
            for name, packed, scale in (
                ("gate_proj", (2048, 896), (2048, 224)),
                ("up_proj", (2048, 896), (2048, 224)),
                ("down_proj", (7168, 256), (7168, 64)),
            ):
                prefix = f"{layer}mlp.experts.{expert}.{name}.weight_"
                yield prefix + "packed", Stored(I32, packed)
                yield prefix + "scale", Stored(BF16, scale)
                yield prefix + "shape", Stored(I32, (2,))
    tower = "vision_tower."
    yield tower + "patch_embed.proj.weight", Stored(BF16, (1152, 3, 14, 14))
    yield tower + "patch_embed.proj.bias", Stored(BF16, (1152,))
    yield tower + "patch_embed.pos_emb.weight", Stored(BF16, (64, 64, 1152))
    block = {
        "norm0": (1152,),
        "norm1": (1152,),
        "wqkv": (3456, 1152),
        "wo": (1152, 1152),
        "mlp.fc0": (4304, 1152),
        "mlp.fc1": (1152, 4304),
    }
    parts = {f"{tower}encoder.blocks.{i}.{name}": shape for i in range(27) for name, shape in block.items()}
    parts[tower + "encoder.final_layernorm"] = parts["mm_projector.pre_norm"] = (1152,)
    parts |= {"mm_projector.proj.0": (4608, 4608), "mm_projector.proj.2": (7168, 4608)}
    for name, shape in parts.items():
        yield name + ".weight", Stored(BF16, shape)
        yield name + ".bias", Stored(BF16, shape[:1])


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, Stored]]:
    found: dict[str, dict[str, Stored]] = {}
    for file, names in shards(K25).items():
        found[file] = {}
        for name, shape in names.items():
            found[file] |= Released(quantised=True).stored(name, shape)
    return found


def test_names_shapes_and_dtypes_are_the_published_ones(files: dict[str, dict[str, Stored]]) -> None:
    ours = {name: stored for content in files.values() for name, stored in content.items()}
    assert ours == dict(_published())
    assert len(ours) == 208_550
    tops = [name.partition(".")[0] for name in ours]
    assert [tops.count(top) for top in ("language_model", "vision_tower", "mm_projector")] == [208_215, 329, 6]


def test_the_files_have_the_published_sizes(files: dict[str, dict[str, Stored]]) -> None:
    """595,177,988,208 bytes in 64 files, headers included, so names, dtypes, the division into shards and the order
    within a file are all the published ones: each shifts the offsets, and with them the length of a header."""
    sizes = {file: len(header(content)[0]) + sum(s.size for s in content.values()) for file, content in files.items()}
    assert list(sizes) == [f"model-{i:05d}-of-000064.safetensors" for i in range(1, 65)]
    assert sum(sizes.values()) == 595_177_988_208
    assert sizes["model-00062-of-000064.safetensors"] == 4_697_635_160
    assert {name.partition(".")[0] for name in files["model-00063-of-000064.safetensors"]} == {"mm_projector"}
    assert {name.partition(".")[0] for name in files["model-00064-of-000064.safetensors"]} == {"vision_tower"}


def test_weights_are_the_models_own_memory_in_the_released_orientation() -> None:
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, moe_intermediate_size=64))
    model = KimiK25(config, media_pad=0)
    views = weights(model)
    with torch.no_grad():
        for view in views.values():
            view.zero_()
    assert all(not tensor.any() for tensor in model.state_dict().values())
    text = config.text
    expert = "language_model.model.layers.1.mlp.experts.7."
    assert views[expert + "gate_proj.weight"].shape == (text.moe_intermediate_size, text.hidden_size)
    assert views[expert + "down_proj.weight"].shape == (text.hidden_size, text.moe_intermediate_size)
    assert sum(view.numel() for view in views.values()) == sum(t.numel() for t in model.state_dict().values())
    assert shapes(config) == {name: tuple(view.shape) for name, view in views.items()}
