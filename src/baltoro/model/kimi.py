"""The assembled multimodal model: MoonViT-3D, projector, K2 language model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baltoro.model.config import ModelConfig
from baltoro.model.decoder import CausalLM
from baltoro.model.moe import Experts, Router
from baltoro.model.packed import Segments
from baltoro.model.vit import Grid, Projector, VisionTower


@dataclass(frozen=True)
class Batch:
    """Packed documents. ids int64 [T] with expanded media placeholders; segments: the documents; patches
    [N, 3, p, p] of all media in document order with their grids (N may be 0)."""

    ids: Tensor
    segments: Segments
    patches: Tensor
    grids: list[Grid]


class KimiK25(nn.Module):
    def __init__(self, config: ModelConfig, media_pad: int, dtype: torch.dtype = torch.float32):
        """`dtype` is the compute dtype; parameters stay in float32 (the master weights)."""
        super().__init__()
        self.config = config
        self.media_pad = media_pad
        self.dtype = dtype
        self.language_model = CausalLM(config.text)
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = Projector(config.vision, config.text.hidden_size)

    def encode_media(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """-> [media tokens, hidden] in the compute dtype."""
        return self.mm_projector(self.vision_tower(patches.to(self.dtype), grids))

    def embed(self, ids: Tensor, patches: Tensor, grids: list[Grid]) -> Tensor:
        """Token embeddings with media tokens in the places of their placeholders, [T, hidden]."""
        x = torch.nn.functional.embedding(ids, self.language_model.model.embed_tokens.weight).to(self.dtype)
        places = (ids == self.media_pad).nonzero()[:, 0]
        media = self.encode_media(patches, grids) if grids else x[:0]
        if len(places) != len(media):
            raise ValueError(f"{len(places)} media placeholders for {len(media)} media tokens")
        return x.index_copy(0, places, media) if grids else x

    def forward(self, batch: Batch) -> Tensor:
        """Normed hidden states [T, hidden]; `logits` turns the ones that matter into scores."""
        x = self.embed(batch.ids, batch.patches, batch.grids)
        return self.language_model.model(x, batch.segments)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.language_model.lm_head(hidden)


def routers(model: nn.Module) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router)]


def count_parameters(model: KimiK25) -> tuple[int, int]:
    """All parameters, and those active per token (top-k of the routed experts; both embedding matrices counted)."""
    text = model.config.text
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    return total, total - routed + routed * text.num_experts_per_tok // text.n_routed_experts
