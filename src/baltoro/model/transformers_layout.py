"""The layout of transformers' own `kimi_k25` modules: other names, routed experts stacked per layer with gate and up
in one tensor, and the vision tower's q, k and v apart, with q and k permuted for half-split rotation.

transformers reads the release's tensor names too, through its conversion table, though not the `vt_*` fields of the
release's config.json. What it writes back by that table (`save_pretrained`, 5.24) has wrong names: the rule for
the vision tower's blocks renames the language model's layers as well; pass `save_original_format=False`.
"""

import math
import re

import torch
from torch import Tensor

from baltoro.model.config import ModelConfig
from baltoro.model.layout import Get, Put, Shape, dtype_of
from baltoro.model.release_config import Json, Release, transformers_json
from baltoro.model.shards import Stored

_RENAMES = [
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model.language_model."),
    (r"mm_projector\.proj\.0\.", "model.mm_projector.in_proj."),
    (r"mm_projector\.proj\.2\.", "model.mm_projector.out_proj."),
    (r"mm_projector\.", "model.mm_projector."),
    (r"vision_tower\.encoder\.blocks\.(\d+)\.norm0\.", r"model.vision_tower.layers.\1.norm1."),
    (r"vision_tower\.encoder\.blocks\.(\d+)\.norm1\.", r"model.vision_tower.layers.\1.norm2."),
    (r"vision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc0\.", r"model.vision_tower.layers.\1.mlp.fc1."),
    (r"vision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc1\.", r"model.vision_tower.layers.\1.mlp.fc2."),
    (r"vision_tower\.encoder\.blocks\.(\d+)\.wo\.", r"model.vision_tower.layers.\1.attn.proj."),
    (r"vision_tower\.encoder\.blocks\.(\d+)\.wqkv\.", r"model.vision_tower.layers.\1.attn.qkv."),
    (r"vision_tower\.encoder\.", "model.vision_tower."),
    (r"vision_tower\.patch_embed\.pos_emb\.weight", "model.vision_tower.patch_embed.pos_emb.position_embeddings"),
    (r"vision_tower\.", "model.vision_tower."),
]
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_QKV = re.compile(r"(.+\.attn)\.qkv\.(weight|bias)")


class Transformers:
    name = "hf"

    def __init__(self, config: ModelConfig):
        self._experts = config.text.n_routed_experts
        self._heads = config.vision.num_heads

    def config(self, release: Release) -> Json:
        return transformers_json(release)

    def stored(self, name: str, shape: Shape) -> dict[str, Stored]:
        name, dtype = _rename(name), dtype_of(name)
        if expert := _EXPERT.fullmatch(name):
            stack, _ = _place(expert, shape)
            return {stack: Stored(dtype, (self._experts, shape[0] * (2 if "gate" in stack else 1), shape[1]))}
        if fused := _QKV.fullmatch(name):
            return {part: Stored(dtype, (shape[0] // 3, *shape[1:])) for part in _parts(fused)}
        return {name: Stored(dtype, shape)}

    def read(self, name: str, shape: Shape, begin: int, end: int, get: Get) -> Tensor:
        name = _rename(name)
        at = 0
        if expert := _EXPERT.fullmatch(name):
            name, at = _place(expert, shape)
        elif fused := _QKV.fullmatch(name):
            q, k, v = (get(part, 0, (shape[0] // 3, *shape[1:])) for part in _parts(fused))
            # Rows of a head: all first channels of the pairs, then all second ones -> pair by pair.
            return torch.cat([*(x.unflatten(0, (self._heads, 2, -1)).transpose(1, 2).flatten(0, 2) for x in (q, k)), v])
        return get(name, at + begin * math.prod(shape[1:]), (end - begin, *shape[1:]))

    def write(self, name: str, shape: Shape, begin: int, rows: Tensor, put: Put) -> None:
        name = _rename(name)
        at = 0
        if expert := _EXPERT.fullmatch(name):
            name, at = _place(expert, shape)
        elif fused := _QKV.fullmatch(name):
            q, k, v = rows.chunk(3)
            q, k = (x.unflatten(0, (self._heads, -1, 2)).transpose(1, 2).flatten(0, 2) for x in (q, k))
            for part, values in zip(_parts(fused), (q, k, v), strict=True):
                put(part, values, 0)
            return
        put(name, rows, at + begin * math.prod(shape[1:]))


def _rename(name: str) -> str:
    for pattern, new in _RENAMES:
        name, renamed = re.subn(f"^{pattern}", new, name)
        if renamed:
            break
    return name


def _place(expert: re.Match[str], shape: Shape) -> tuple[str, int]:
    """The stack in which a routed expert's matrix lies, and its first element there: gate above up."""
    prefix, index, projection = expert[1], int(expert[2]), expert[3]
    if projection == "down":
        return f"{prefix}.down_proj", index * math.prod(shape)
    return f"{prefix}.gate_up_proj", (2 * index + (projection == "up")) * math.prod(shape)


def _parts(fused: re.Match[str]) -> list[str]:
    return [f"{fused[1]}.{part}_proj.{fused[2]}" for part in "qkv"]
