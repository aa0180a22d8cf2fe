"""The K2 language model."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from baltoro.model.attention import MLA, CachePlan
from baltoro.model.config import TextConfig
from baltoro.model.layers import Linear, RMSNorm, SwiGLU
from baltoro.model.moe import MoE
from baltoro.model.packed import Segments
from baltoro.model.rope import inverse_frequencies, rotations


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.first_k_dense
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x: Tensor, rotation: Tensor, segments: Segments) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, segments)
        return x + self.mlp(self.post_attention_layernorm(x))

    def extend(self, x: Tensor, rotation: Tensor, cache: Tensor, plan: CachePlan) -> Tensor:
        x = x + self.self_attn.extend(self.input_layernorm(x), rotation, cache, plan)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    inv_freq: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.recompute = False

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """x [T, dim] embeddings of packed documents -> normed states [T, dim]. With `recompute` a layer keeps its input
        alone, and the backward pass computes the rest again; routers then count their load twice, which moves no bias
        elsewhere, for only the sign of its deviation counts."""
        rotation = rotations(segments.positions, self.inv_freq, x.dtype)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, rotation, segments, use_reentrant=False)
            else:
                x = layer(x, rotation, segments)
        return self.norm(x)

    def extend(self, x: Tensor, cache: list[Tensor], plan: CachePlan) -> Tensor:
        """x [T, dim] embeddings of new tokens of several sequences -> normed states [T, dim]; `cache` holds per layer
        [pages, page, R + rope] and is extended in place."""
        rotation = rotations(plan.positions, self.inv_freq, x.dtype)
        for layer, kept in zip(self.layers, cache, strict=True):
            assert isinstance(layer, DecoderLayer)
            x = layer.extend(x, rotation, kept, plan)
        return self.norm(x)


class CausalLM(nn.Module):
    """Names follow the released checkpoint: model.*, lm_head.*."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
