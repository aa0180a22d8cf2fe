"""config.json of a checkpoint, both ways: the release's spelling and that of transformers.

A field that this model does not know, or a value that it does not compute, is an error that names the field.
"""

from dataclasses import dataclass
from typing import Any

from baltoro.model.config import ModelConfig, TextConfig, VisionConfig, Yarn
from baltoro.model.int4 import GROUP

Json = dict[str, Any]

# Distances from <|media_pad|>: the special tokens stand in one order whatever the vocabulary (model.md section 10).
_BOS, _EOS, _IM_END, _MEDIA_BEGIN, _MEDIA_END = -21, -20, -19, -3, -1


@dataclass(frozen=True)
class Release:
    """What config.json says. `max_position` is the context length in tokens."""

    model: ModelConfig
    media_pad: int
    max_position: int

    @property
    def stop(self) -> int:
        """<|im_end|>, the token that ends a turn. The config of K2.5 names [EOS] instead, K2.6's the right one."""
        return self.media_pad + _IM_END


_TEXT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "first_k_dense": "first_k_dense_replace",
    "n_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "n_shared_experts": "n_shared_experts",
    "moe_intermediate_size": "moe_intermediate_size",
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
}
_VISION_FIELDS = {
    "patch_size": "patch_size",
    "hidden_size": "vt_hidden_size",
    "num_layers": "vt_num_hidden_layers",
    "num_heads": "vt_num_attention_heads",
    "intermediate_size": "vt_intermediate_size",
    "pos_emb_height": "init_pos_emb_height",
    "pos_emb_width": "init_pos_emb_width",
    "max_frames": "init_pos_emb_time",
}
_TRANSFORMERS_VISION_FIELDS = {
    field: name.removeprefix("vt_").removeprefix("init_") for field, name in _VISION_FIELDS.items()
}

# What this model computes and a config may say otherwise.
_TEXT_FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "n_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
}
_YARN_FIXED = {"mscale": 1.0, "mscale_all_dim": 1.0}
_VISION_FIXED = {
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
    "video_attn_type": "spatial_temporal",
}
_TRANSFORMERS_TEXT_FIXED = {"rope_interleave": True}
_TRANSFORMERS_VISION_FIXED = {
    "hidden_act": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
}
# Training settings, bookkeeping and generation defaults that say nothing about what the weights compute.
_BOOKKEEPING = """
_attn_implementation _name_or_path add_cross_attention architectures auto_map aux_loss_alpha bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id head_dim id2label
ignore_index is_decoder is_encoder_decoder label2id length_penalty max_length max_position_embeddings min_length
model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type pruned_heads qk_head_dim
quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
seq_aux suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
_TOP = """
image_token_id media_placeholder_token_id projection_hidden_size projection_layer_norm_eps text_config
use_unified_vision_chunk video_placeholder video_token_id vision_config vision_end_token_id vision_start_token_id
"""
_QUANTIZATION: Json = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": GROUP,
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
    # vision_tower and mm_projector are not named, and are bfloat16 all the same.
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def released_json(release: Release, quantised: bool) -> Json:
    """As K2.5 was released, with the stop token of its generation_config.json."""
    text, vision = release.model.text, release.model.vision
    ids = _ids(release)
    quantization = {"quantization_config": _QUANTIZATION} if quantised else {}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "ignore_index": -100,
        "media_placeholder_token_id": release.media_pad,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        **ids,
        **quantization,
        "text_config": {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "dtype": "bfloat16",
            "num_key_value_heads": text.num_heads,
            "max_position_embeddings": release.max_position,
            "rope_theta": text.rope_theta,
            "rope_scaling": None if text.yarn is None else {"type": "yarn", **_yarn_json(text.yarn)},
            "aux_loss_alpha": 0.001,
            "seq_aux": True,
            "use_cache": True,
            **{name: getattr(text, field) for field, name in _TEXT_FIELDS.items()},
            **_TEXT_FIXED,
            **ids,
            **quantization,
        },
        "vision_config": {
            "merge_kernel_size": [vision.merge, vision.merge],
            "mm_hidden_size": vision.hidden_size,
            "text_hidden_size": text.hidden_size,
            **{name: getattr(vision, field) for field, name in _VISION_FIELDS.items()},
            **_VISION_FIXED,
        },
    }


def transformers_json(release: Release) -> Json:
    """As transformers' `Kimi_K25Config` spells it; that class does not read the release's `vt_*` names."""
    text, vision = release.model.text, release.model.vision
    rope = {"rope_type": "default"} if text.yarn is None else {"rope_type": "yarn", **_yarn_json(text.yarn)}
    return {
        "architectures": ["Kimi_K25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "image_token_id": release.media_pad,
        # A clip's placeholder is a token of its own there, just outside the embedding table.
        "video_token_id": text.vocab_size,
        "vision_start_token_id": release.media_pad + _MEDIA_BEGIN,
        "vision_end_token_id": release.media_pad + _MEDIA_END,
        "projection_hidden_size": vision.hidden_size,
        "projection_layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "deepseek_v3",
            "dtype": "bfloat16",
            "num_key_value_heads": text.num_heads,
            "max_position_embeddings": release.max_position,
            "rope_parameters": {"rope_theta": text.rope_theta, **rope},
            **{name: getattr(text, field) for field, name in _TEXT_FIELDS.items()},
            **_TEXT_FIXED,
            **_TRANSFORMERS_TEXT_FIXED,
            **_ids(release),
        },
        "vision_config": {
            "model_type": "kimi_k25_vision",
            "merge_kernel_size": [vision.merge, vision.merge],
            **{name: getattr(vision, field) for field, name in _TRANSFORMERS_VISION_FIELDS.items()},
            **_TRANSFORMERS_VISION_FIXED,
        },
    }


def parse(config: Json) -> Release:
    """Either spelling. Raises ValueError that names the field."""
    _expect(config, {"model_type": "kimi_k25", "tie_word_embeddings": False}, "")
    _know(config, {*_TOP.split(), "tie_word_embeddings"}, "")
    text, vision = _table(config, "text_config"), _table(config, "vision_config")
    media_pad = _first(config, "media_placeholder_token_id", "image_token_id", where="")
    for table, where in ((config, ""), (text, "text_config.")):
        _check_ids(table, media_pad, where)
        if table.get("quantization_config") is not None:
            _check_quantization(table["quantization_config"], where + "quantization_config.")
    return Release(
        ModelConfig(_text(text), _vision(vision, config, int(text["hidden_size"]))),
        media_pad,
        _first(text, "max_position_embeddings", where="text_config."),
    )


def _text(text: Json) -> TextConfig:
    where = "text_config."
    if text.get("model_type") not in ("deepseek_v3", "kimi_k2"):
        raise ValueError(f"{where}model_type is {text.get('model_type')!r}; expected deepseek_v3 or kimi_k2")
    fixed = _TEXT_FIXED | _TRANSFORMERS_TEXT_FIXED
    rope_names = {"rope_theta", "rope_scaling", "rope_parameters"}
    _know(text, {*_TEXT_FIELDS.values(), *fixed, "num_key_value_heads"} | rope_names, where)
    values = {field: _first(text, name, where=where) for field, name in _TEXT_FIELDS.items()}
    _expect(text, fixed | {"num_key_value_heads": values["num_heads"]}, where)
    # transformers 5 writes rope_parameters, the release rope_theta and rope_scaling.
    spelling = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = {"rope_theta": text.get("rope_theta")} | (text.get(spelling) or {})
    where += f"{spelling}."
    kind = rope.get("rope_type", rope.get("type", "default"))
    yarn = None
    if kind == "yarn":
        names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        _know(rope, {*names, *_YARN_FIXED, "rope_theta", "rope_type", "type"}, where)
        _expect(rope, _YARN_FIXED, where, absent=False)
        factor, original, fast, slow = (_first(rope, name, where=where) for name in names)
        yarn = Yarn(float(factor), original, float(fast), float(slow))
    elif kind != "default":
        raise ValueError(f"{where}type is {kind!r}; expected yarn or none")
    return TextConfig(**values, rope_theta=float(_first(rope, "rope_theta", where=where)), yarn=yarn)


def _vision(vision: Json, config: Json, text_hidden: int) -> VisionConfig:
    where = "vision_config."
    released = "vt_hidden_size" in vision
    names = _VISION_FIELDS if released else _TRANSFORMERS_VISION_FIELDS
    fixed = _VISION_FIXED if released else _TRANSFORMERS_VISION_FIXED
    _know(vision, {*names.values(), *fixed, "merge_kernel_size", "mm_hidden_size", "text_hidden_size"}, where)
    values = {field: _first(vision, name, where=where) for field, name in names.items()}
    merge = _first(vision, "merge_kernel_size", where=where)[0]
    width = values["hidden_size"]
    _expect(vision, fixed | {"merge_kernel_size": [merge, merge]}, where)
    _expect(vision, {"mm_hidden_size": width, "text_hidden_size": text_hidden}, where)
    _expect(config, {"projection_hidden_size": width, "projection_layer_norm_eps": 1e-5}, "")
    return VisionConfig(**values, merge=merge)


def _ids(release: Release) -> Json:
    return {
        "bos_token_id": release.media_pad + _BOS,
        "eos_token_id": release.stop,
        "pad_token_id": release.model.text.vocab_size - 1,
    }


def _yarn_json(yarn: Yarn) -> Json:
    return {
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        **_YARN_FIXED,
    }


def _table(config: Json, name: str, where: str = "") -> Json:
    if not isinstance(config.get(name), dict):
        raise ValueError(f"{where}{name} is missing")
    return config[name]


def _first(table: Json, *names: str, where: str) -> Any:
    for name in names:
        if name in table:
            return table[name]
    raise ValueError(f"{where}{names[0]} is missing")


def _know(table: Json, names: set[str], where: str) -> None:
    for name in table.keys() - names - set(_BOOKKEEPING.split()):
        raise ValueError(f"{where}{name} is unknown; this model has no such part")


def _expect(table: Json, values: Json, where: str, absent: bool = True) -> None:
    for name, value in values.items():
        if name not in table and absent:
            continue
        if (given := table.get(name)) != value:
            raise ValueError(f"{where}{name} is {given!r}; this model computes only {value!r}")


def _check_ids(table: Json, media_pad: int, where: str) -> None:
    allowed = {"bos_token_id": {media_pad + _BOS}, "eos_token_id": {media_pad + _EOS, media_pad + _IM_END}}
    for name, ids in allowed.items():
        given = table.get(name)
        if given is not None and not set(given if isinstance(given, list) else [given]) <= ids:
            wanted = " or ".join(str(i) for i in sorted(ids))
            raise ValueError(f"{where}{name} is {given!r}; with <|media_pad|> at {media_pad} it is {wanted}")


def _check_quantization(given: Json, where: str) -> None:
    _expect(given, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, where, absent=False)
    groups = _table(given, "config_groups", where)
    where += "config_groups."
    weights = _table(_table(groups, "group_0", where), "weights", where + "group_0.")
    fixed = {"num_bits": 4, "group_size": GROUP, "symmetric": True, "type": "int", "strategy": "group"}
    _expect(weights, fixed, where + "group_0.weights.", absent=False)
