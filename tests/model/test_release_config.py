"""config.json as published for K2.5 (parsed by transformers 5.7) and what else the family writes."""

import copy
from typing import Any

import pytest

from baltoro.model.config import K25, MOONLIGHT, NANO
from baltoro.model.release_config import Release, parse, released_json, transformers_json

QUANTIZATION = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
PUBLISHED: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163585,
    "ignore_index": -100,
    "media_placeholder_token_id": 163605,
    "model_type": "kimi_k25",
    "pad_token_id": 163839,
    "quantization_config": QUANTIZATION,
    "text_config": {
        "_name_or_path": "",
        "add_cross_attention": False,
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 163584,
        "chunk_size_feed_forward": 0,
        "dtype": "bfloat16",
        "eos_token_id": 163585,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 262144,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 163839,
        "pretraining_tp": 1,
        "pruned_heads": {},
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": QUANTIZATION,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 50000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 163840,
    },
    "tie_word_embeddings": False,
    "transformers_version": "5.7.0",
    "use_unified_vision_chunk": True,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "vision_config": {
        "init_pos_emb_height": 64,
        "init_pos_emb_time": 4,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool",
        "mm_hidden_size": 1152,
        "mm_projector_type": "patchmerger",
        "model_type": "",
        "patch_size": 14,
        "pos_emb_type": "divided_fixed",
        "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-05,
        "text_hidden_size": 7168,
        "video_attn_type": "spatial_temporal",
        "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304,
        "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": 27,
    },
}
RELEASE = Release(K25, media_pad=163605, max_position=262144)


def _changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(PUBLISHED)
    *tables, name = path.split(".")
    table = config
    for step in tables:
        table = table[step]
    table[name] = value
    return config


def test_the_published_config_is_k25_and_stops_at_im_end() -> None:
    assert parse(PUBLISHED) == RELEASE
    assert parse(PUBLISHED).stop == 163586


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.model_type", "kimi_k2"),
        ("text_config.eos_token_id", 163586),
        ("eos_token_id", 163586),
        ("eos_token_id", [163585, 163586]),
        ("quantization_config", None),
        ("text_config.quantization_config", None),
    ],
)
def test_what_varies_in_the_family_changes_nothing(path: str, value: Any) -> None:
    assert parse(_changed(path, value)) == RELEASE


def test_the_older_spelling_of_yarn_is_read() -> None:
    config = copy.deepcopy(PUBLISHED)
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    assert parse(config) == RELEASE


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", "kimi_k3"),
        ("tie_word_embeddings", True),
        ("eos_token_id", 2),
        ("audio_config", {}),
        ("quantization_config.format", "mxfp4-pack-quantized"),
        ("quantization_config.config_groups.group_0.weights.num_bits", 8),
        ("text_config.model_type", "qwen3"),
        ("text_config.n_group", 8),
        ("text_config.scoring_func", "softmax"),
        ("text_config.num_key_value_heads", 8),
        ("text_config.num_nextn_predict_layers", 1),
        ("text_config.sliding_window", 4096),
        ("text_config.bos_token_id", 0),
        ("text_config.rope_parameters.rope_type", "linear"),
        ("text_config.rope_parameters.mscale", 0.707),
        ("text_config.rope_parameters.truncate", False),
        ("vision_config.merge_type", "sd2"),
        ("vision_config.merge_kernel_size", [2, 3]),
        ("vision_config.mm_hidden_size", 1024),
        ("vision_config.qkv_hidden_size", 1536),
    ],
)
def test_what_this_model_does_not_compute_is_an_error_that_names_the_field(path: str, value: Any) -> None:
    name = path.replace("rope_type", "type")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        parse(_changed(path, value))


@pytest.mark.parametrize(
    "path", ["text_config.hidden_size", "vision_config.patch_size", "text_config", "vision_config"]
)
def test_a_missing_field_is_named(path: str) -> None:
    config = copy.deepcopy(PUBLISHED)
    table, _, name = path.rpartition(".")
    del (config[table] if table else config)[name]
    with pytest.raises(ValueError, match=f"{path.replace('.', '[.]')} is missing"):
        parse(config)


def test_we_write_what_was_published() -> None:
    """Every published field that says what the weights compute, and eos as in generation_config.json."""
    ours = released_json(RELEASE, quantised=True)
    for where in ("", "text_config", "vision_config"):
        published, written = (config[where] if where else config for config in (PUBLISHED, ours))
        for name, value in written.items():
            if name == "eos_token_id":
                assert value == 163586
            elif name == "rope_scaling":
                assert value.items() <= published["rope_parameters"].items()
            elif name not in ("text_config", "vision_config"):
                assert published[name] == value, name
    assert "quantization_config" not in released_json(RELEASE, quantised=False)["text_config"]


@pytest.mark.parametrize("model", [K25, MOONLIGHT, NANO])
def test_both_spellings_come_back(model: Any) -> None:
    release = Release(model, media_pad=1000, max_position=8192)
    assert parse(released_json(release, quantised=True)) == release
    assert parse(transformers_json(release)) == release
