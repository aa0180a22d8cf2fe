"""transformers' `deepseek_v3` and `kimi_k25` as oracles, and all that must be said to make them one.

Other layouts of the same weights, translated in `to_oracle`: renamed keys; wqkv of the vision tower unfused, with the
channels of q and k reordered per head (even ones first, then odd ones, so that its rotation of halves turns the pairs
(2k, 2k + 1)); experts as fused (gate, up) stacks, transposed.

Other conventions, met below: embeddings tied by default; experts in groups; a token of its own for video.

Faults, mended here and shown in `test_faults.py`:
- The norms inside MLA ignore `rms_norm_eps` and always use 1e-6 (transformers issue 44261; K2 has 1e-5; vLLM and SGLang
  use the configured value, and so do we).
- float32 is hard-coded in norms, rotations, routers, position tables, eager softmax and temporal pooling, so the model
  is no better than float32 in float64. `Widened` runs the unchanged code with float64 in the place of float32.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25VisionConfig,
    Kimi_K25VisionModel,
    PreTrainedModel,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3TopkRouter

from baltoro.model.config import ModelConfig, TextConfig, VisionConfig
from baltoro.model.moe import Router
from baltoro.model.vit import Grid

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DTYPES = list(TOLERANCE)


class Widened(TorchFunctionMode):
    """Every request for float32 is one for float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Where oracles are built and run, so that they compute in `dtype` throughout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with Widened() if dtype == torch.float64 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def text_config(config: TextConfig) -> DeepseekV3Config:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    yarn = config.yarn
    if yarn is not None:
        rope = {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        n_shared_experts=config.n_shared_experts,
        n_routed_experts=config.n_routed_experts,
        routed_scaling_factor=config.routed_scaling_factor,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=config.num_experts_per_tok,
        first_k_dense_replace=config.first_k_dense,
        max_position_embeddings=4096 if yarn is None else int(yarn.factor * yarn.original_max_position),
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
    )


def vision_config(config: VisionConfig) -> Kimi_K25VisionConfig:
    return Kimi_K25VisionConfig(
        patch_size=config.patch_size,
        pos_emb_height=config.pos_emb_height,
        pos_emb_width=config.pos_emb_width,
        pos_emb_time=config.max_frames,
        num_attention_heads=config.num_heads,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        merge_kernel_size=(config.merge, config.merge),
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )


def text_oracle(ours: nn.Module, config: TextConfig, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    with precision(dtype):
        oracle = DeepseekV3ForCausalLM(text_config(config))
    _mend(oracle, config)
    oracle.load_state_dict(to_oracle(ours.state_dict()))
    return oracle


def vision_oracle(ours: nn.Module, config: VisionConfig, dtype: torch.dtype) -> Kimi_K25VisionModel:
    with precision(dtype):
        oracle = Kimi_K25VisionModel(vision_config(config))
    oracle.load_state_dict(to_oracle(ours.state_dict(), config.num_heads))
    return oracle


def multimodal_oracle(
    ours: nn.Module, config: ModelConfig, media_pad: int, dtype: torch.dtype
) -> Kimi_K25ForConditionalGeneration:
    """Its image token is our media placeholder; its video token is the first id after the vocabulary."""
    whole = Kimi_K25Config(
        text_config=text_config(config.text),
        vision_config=vision_config(config.vision),
        projection_hidden_size=config.vision.hidden_size,
        image_token_id=media_pad,
        video_token_id=config.text.vocab_size,
        tie_word_embeddings=False,
    )
    with precision(dtype):
        oracle = Kimi_K25ForConditionalGeneration(whole)
    _mend(oracle, config.text)
    oracle.load_state_dict(to_oracle(ours.state_dict(), config.vision.num_heads))
    return oracle


def _mend(oracle: PreTrainedModel, config: TextConfig) -> None:
    oracle.set_experts_implementation("eager")
    for module in oracle.modules():
        if isinstance(module, DeepseekV3Attention):
            for norm in (module.q_a_layernorm, module.kv_a_layernorm):
                if norm is not None:
                    norm.variance_epsilon = config.rms_norm_eps


_RENAMED = [
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|mm_projector)\.", r"model.\1."),
    (r"(blocks\.\d+\.)norm1\.", r"\1norm2."),
    (r"(blocks\.\d+\.)norm0\.", r"\1norm1."),
    (r"mlp\.fc1\.", "mlp.fc2."),
    (r"mlp\.fc0\.", "mlp.fc1."),
    (r"(blocks\.\d+\.)wo\.", r"\1attn.proj."),
    (r"encoder\.blocks\.", "layers."),
    (r"encoder\.", ""),
    (r"pos_emb\.weight", "pos_emb.position_embeddings"),
    (r"proj\.0\.", "in_proj."),
    (r"proj\.2\.", "out_proj."),
]


def halves(x: Tensor, heads: int) -> Tensor:
    """Channels (dim 0) of each head from interleaved pairs to all even ones, then all odd ones."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_oracle(ours: Mapping[str, Tensor], vision_heads: int = 0) -> dict[str, Tensor]:
    """Parameters of our model or of a part of it in the oracle's layout; their gradients alike, for it is linear."""
    out: dict[str, Tensor] = {}
    for name, x in ours.items():
        if name.endswith("experts.up_proj"):
            continue
        if name.endswith("experts.gate_proj"):
            up = ours[name.replace("gate_proj", "up_proj")]
            name, x = name.replace("gate_proj", "gate_up_proj"), torch.cat((x, up), -1).mT
        elif name.endswith("experts.down_proj"):
            x = x.mT
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".wqkv." in name:
            q, k, v = x.chunk(3)
            for key, part in (("q", halves(q, vision_heads)), ("k", halves(k, vision_heads)), ("v", v)):
                out[name.replace("wqkv", f"attn.{key}_proj")] = part
        else:
            out[name] = x
    return out


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """No weight is what it is by default: norms around 1, biases (the routers' too) around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.state_dict().items():
        x.normal_(0, 0.2, generator=generator)
        if "norm" in name and name.endswith("weight"):
            x += 1


def multimodal_inputs(
    config: Kimi_K25Config, ids: Tensor, grids: list[Grid], items: Iterator[Tensor]
) -> dict[str, Tensor | bool]:
    """One document for the multimodal oracle, which wants images and clips apart; takes the patches of each of `grids`
    from `items`."""
    ids = ids.clone()
    places = (ids == config.image_token_id).nonzero()[:, 0]
    patches: dict[str, list[Tensor]] = {"image": [], "video": []}
    sizes: dict[str, list[Grid]] = {"image": [], "video": []}
    for grid, mine in zip(grids, places.split([h * w // 4 for _, h, w in grids]), strict=True):
        kind = "image" if grid[0] == 1 else "video"
        ids[mine] = getattr(config, f"{kind}_token_id")
        patches[kind].append(next(items))
        sizes[kind].append(grid)
    inputs: dict[str, Tensor | bool] = {"input_ids": ids[None], "use_cache": False}
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if patches[kind]:
            inputs |= {key: torch.cat(patches[kind]), f"{kind}_grid_thw": torch.tensor(sizes[kind])}
    return inputs


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: gradient(p) for name, p in model.named_parameters()}


def assert_equal(ours: Mapping[str, Tensor], oracle: Mapping[str, Tensor], tolerance: float) -> None:
    """The same names, and for each |ours - oracle| <= tolerance |oracle| in the Euclidean norm."""
    assert ours.keys() == oracle.keys()
    for name, want in oracle.items():
        got = ours[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        error = float((got.detach() - want.detach()).norm() / want.detach().norm())
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


class Routes:
    """The experts that every router of a model chose, in calls [T, K], ascending: the models agree in float32 only
    where they chose alike."""

    def __init__(self, model: nn.Module):
        self.chosen: dict[nn.Module, list[Tensor]] = {}
        for module in model.modules():
            if isinstance(module, Router | DeepseekV3TopkRouter):
                self.chosen[module] = []
                module.register_forward_hook(self._record)

    def _record(self, router: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        ids = next(x for x in output if not x.is_floating_point())
        self.chosen[router].append(ids.sort(-1).values)

    def __iter__(self) -> Iterator[Tensor]:
        """Per layer [T, K]; calls one after another."""
        return (torch.cat(calls) for calls in self.chosen.values())
