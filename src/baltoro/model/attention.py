"""Attention over packed sequences, and MLA.

Shape legend: T packed tokens, H heads, D qk head dim (nope + rope), V value head dim, R kv_lora_rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baltoro.model.config import TextConfig
from baltoro.model.layers import Linear, RMSNorm
from baltoro.model.rope import rotate, softmax_scale

# Below this width explicit scores are faster than the CPU flash kernel (bf16, measured); above, memory decides.
_EXPLICIT_WIDTH = 1024


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of similar length as one padded batch of shape (rows, width); `lengths` int64 [rows]."""

    rows: int
    width: int
    lengths: Tensor
    padded: bool


class Segments:
    """Which tokens of a packed sequence may see each other: contiguous segments that never attend across.

    `index` int64 points from the places of all groups, one after another, into the packed sequence (padding repeats a
    segment's last token); `inverse` int64 [total] points back.
    """

    def __init__(self, lengths: list[int], device: torch.device | None = None):
        self.lengths = lengths
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.total = starts[-1]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.groups: list[SegmentGroup] = []
        indices: list[Tensor] = []
        inverse = torch.empty(self.total, dtype=torch.int64)
        base = begin = 0
        while begin < len(order):
            shortest = lengths[order[begin]]
            end = begin + 1
            while end < len(order) and lengths[order[end]] <= max(1.4 * shortest, shortest + 8):
                end += 1
            members = order[begin:end]
            rows, width = len(members), lengths[members[-1]]
            size = torch.tensor([lengths[m] for m in members])
            start = torch.tensor([starts[m] for m in members])
            index = start[:, None] + torch.minimum(torch.arange(width)[None, :], size[:, None] - 1)
            valid = torch.arange(width)[None, :] < size[:, None]
            inverse[index[valid]] = torch.arange(base, base + rows * width).view(rows, width)[valid]
            indices.append(index.flatten())
            self.groups.append(SegmentGroup(rows, width, size.to(device), bool((size != width).any())))
            base += rows * width
            begin = end
        self.index = torch.cat(indices).to(device)
        self.inverse = inverse.to(device)
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float, max_logits: Tensor | None = None
) -> Tensor:
    """q, k [T, H, D], v [T, H, V] -> [T, H, V]. `max_logits` [H] is raised in place to the largest visible logit."""
    outputs: list[Tensor] = []
    sizes = [group.rows * group.width for group in segments.groups]
    # One gather for all groups: its backward is one scatter, where one per group would each fill a whole gradient.
    gathered = zip(*(x.index_select(0, segments.index).split(sizes) for x in (q, k, v)), strict=True)
    for group, parts in zip(segments.groups, gathered, strict=True):
        rows, width = group.rows, group.width
        gq, gk, gv = (x.view(rows, width, *x.shape[1:]).transpose(1, 2) for x in parts)
        hidden = None
        if causal:
            # Padding stands at the end, so the causal mask already hides it from every real token.
            hidden = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
        elif group.padded:
            hidden = (torch.arange(width, device=q.device)[None, :] >= group.lengths[:, None])[:, None, None, :]
        if width <= _EXPLICIT_WIDTH and q.device.type == "cpu":
            scores = (gq * scale) @ gk.transpose(-1, -2)
            if hidden is not None:
                scores = scores.masked_fill(hidden, float("-inf"))
            if max_logits is not None:
                torch.maximum(max_logits, scores.detach().amax(dim=(0, 2, 3)).to(max_logits.dtype), out=max_logits)
            out = scores.softmax(-1) @ gv
        else:
            if max_logits is not None:
                _raise_max_logits(max_logits, gq, gk, hidden, scale)
            mask = None if causal or hidden is None else ~hidden
            out = F.scaled_dot_product_attention(gq, gk, gv, attn_mask=mask, is_causal=causal, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(rows * width, *v.shape[1:]))
    return torch.cat(outputs).index_select(0, segments.inverse)


@torch.no_grad()
def _raise_max_logits(max_logits: Tensor, q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> None:
    """The same record in query chunks, for widths at which the full score matrix is not wanted."""
    for begin in range(0, q.shape[2], 256):
        scores = (q[:, :, begin : begin + 256] * scale) @ k.transpose(-1, -2)
        if hidden is not None:
            rows = hidden[begin : begin + 256] if hidden.dim() == 2 else hidden
            scores = scores.masked_fill(rows, float("-inf"))
        torch.maximum(max_logits, scores.amax(dim=(0, 2, 3)).to(max_logits.dtype), out=max_logits)


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2; K2 uses it unchanged). Parameter names are the released ones."""

    max_logits: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        heads, dim = config.num_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(dim, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(dim, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(dim, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, dim)
        self.register_buffer("max_logits", torch.full((heads,), float("-inf")), persistent=False)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[T, dim] -> nope part [T, H, nope] and rotated part [T, H, rope]."""
        c = self.config
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        nope, rope = q.view(-1, c.num_heads, c.qk_head_dim).split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        return nope, rotate(rope, cos, sin)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, dim] -> what the cache holds per token: normed latent and rotated shared key, [T, R + rope]."""
        latent, rope = self.kv_a_proj_with_mqa(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(rope[:, None], cos, sin)[:, 0]), -1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """x [T, dim] of packed documents -> [T, dim]."""
        c = self.config
        q_nope, q_rope = self.queries(x, cos, sin)
        latent, k_rope = self.latents(x, cos, sin).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        k_nope, v = (
            self.kv_b_proj(latent)
            .view(-1, c.num_heads, c.qk_nope_head_dim + c.v_head_dim)
            .split((c.qk_nope_head_dim, c.v_head_dim), -1)
        )
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, c.num_heads, -1)), -1)
        record = self.max_logits if self.training else None
        out = segment_attention(q, k, v, segments, causal=True, scale=self.scale, max_logits=record)
        return self.o_proj(out.flatten(-2))

    def extend(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, plan: "CachePlan") -> Tensor:
        """New tokens against cached latents, with kv_b absorbed into query and output, so that the cache is never
        decompressed. x [T, dim] packed new tokens; cache [slots, max_len, R + rope], written at the tokens' places.
        Returns [T, dim]."""
        c = self.config
        cache[plan.slots, plan.positions] = self.latents(x, cos, sin).to(cache.dtype)
        q_nope, q_rope = self.queries(x, cos, sin)
        up_k, up_v = (
            self.kv_b_proj.weight.to(x.dtype)
            .view(c.num_heads, -1, c.kv_lora_rank)
            .split((c.qk_nope_head_dim, c.v_head_dim), 1)
        )
        q = torch.cat((torch.einsum("thd,hdr->thr", q_nope, up_k), q_rope), -1) * self.scale
        mixed = torch.empty(len(x), c.num_heads, c.kv_lora_rank, dtype=x.dtype, device=x.device)
        for group in plan.groups:
            rows, width = group.tokens.shape
            seen = cache[group.slots, : group.width]
            gq = q[group.tokens].transpose(1, 2).reshape(rows, c.num_heads * width, -1)
            scores = (gq @ seen.transpose(1, 2)).view(rows, c.num_heads, width, -1)
            weights = scores.masked_fill(group.hidden[:, None], float("-inf")).softmax(-1).flatten(1, 2)
            out = (weights @ seen[..., : c.kv_lora_rank]).view(rows, c.num_heads, width, -1).transpose(1, 2)
            mixed[group.tokens[group.valid]] = out[group.valid]
        return self.o_proj(torch.einsum("thr,hvr->thv", mixed, up_v).flatten(-2))


@dataclass(frozen=True)
class CacheGroup:
    """Sequences of similar shape: `tokens` int64 [rows, width] index the packed new tokens (padding repeats the last),
    `valid` marks the real ones; `hidden` bool [rows, width, seen] is True where a cached place must not be seen."""

    slots: Tensor
    tokens: Tensor
    valid: Tensor
    hidden: Tensor
    width: int


class CachePlan:
    """Where each packed new token lives in the cache: `slots`, `positions` int64 [T]."""

    def __init__(self, spans: list[tuple[int, int, int]]):
        """spans: (slot, first position, end position) of each sequence's new tokens, in packed order."""
        self.slots = torch.tensor([slot for slot, a, b in spans for _ in range(a, b)])
        self.positions = torch.tensor([p for _, a, b in spans for p in range(a, b)])
        buckets: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        start = 0
        for slot, a, b in spans:
            # Powers of two (of the new tokens and of the whole length) bound the padding to a factor of two.
            buckets.setdefault(((b - a - 1).bit_length(), (b - 1).bit_length()), []).append((start, slot, a, b))
            start += b - a
        self.groups: list[CacheGroup] = []
        for members in buckets.values():
            width = max(b - a for _, _, a, b in members)
            seen = max(b for _, _, _, b in members)
            first = torch.tensor([m[0] for m in members])[:, None]
            count = torch.tensor([b - a for _, _, a, b in members])[:, None]
            begin = torch.tensor([a for _, _, a, _ in members])[:, None]
            offset = torch.minimum(torch.arange(width)[None, :], count - 1)
            hidden = torch.arange(seen)[None, None, :] > (begin + offset)[:, :, None]
            slots = torch.tensor([m[1] for m in members])
            self.groups.append(CacheGroup(slots, first + offset, torch.arange(width)[None, :] < count, hidden, seen))
