"""Attention over packed sequences, and MLA.

Shape legend: T packed tokens, H heads, D qk head dim (nope + rope), V value head dim, R kv_lora_rank.
"""

from collections.abc import Iterator
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
        decompressed. x [T, dim] packed new tokens; cache [pages, page, R + rope], written at the tokens' places.
        Returns [T, dim]. No gradients."""
        c = self.config
        cache.view(-1, cache.shape[-1]).index_copy_(0, plan.places, self.latents(x, cos, sin))
        q_nope, q_rope = self.queries(x, cos, sin)
        up_k, up_v = (
            self.kv_b_proj.weight.to(x.dtype)
            .view(c.num_heads, -1, c.kv_lora_rank)
            .split((c.qk_nope_head_dim, c.v_head_dim), 1)
        )
        q = torch.cat((torch.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1), q_rope), -1).mul_(self.scale)
        mixed = x.new_empty(len(x), c.num_heads, c.kv_lora_rank)
        for tile in plan.tiles:
            seen = cache.index_select(0, tile.pages).view(tile.rows, -1, cache.shape[-1])[:, : tile.seen]
            scores = torch.bmm(q[tile.tokens].view(tile.rows, -1, q.shape[-1]), seen.transpose(1, 2))
            if tile.hidden is not None:
                tail = scores.view(tile.rows, -1, c.num_heads, tile.seen)[..., -tile.hidden.shape[-1] :]
                tail.masked_fill_(tile.hidden, float("-inf"))
            out = mixed[tile.tokens].view(tile.rows, -1, c.kv_lora_rank)
            torch.bmm(scores.softmax(-1), seen[..., : c.kv_lora_rank], out=out)
        return self.o_proj(torch.bmm(mixed.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1).flatten(1))


# Most new tokens of one sequence in a tile: later ones see more, so larger tiles score more that is masked.
_PIECE = 64


def _tile_numbers(device: torch.device) -> int:
    """How many numbers of cache and scores a tile may hold: what stays in a CPU's cache between its operations; on
    accelerators only memory bounds it."""
    return 2**18 if device.type == "cpu" else 2**26


@dataclass(frozen=True)
class CacheTile:
    """Equally many new tokens of each of `rows` sequences, which stand together in the packed order at `tokens`.

    pages int64 [rows * n]: the sequences' first n pages, where n pages hold the longest. seen: how many cached tokens
    the longest one has. hidden bool [rows, new, 1, s] is True where one of the last s seen tokens must not be seen; the
    tokens before them are visible to all. None where that is every token.
    """

    tokens: slice
    rows: int
    pages: Tensor
    seen: int
    hidden: Tensor | None


class CachePlan:
    """Where packed new tokens stand (`positions` int64 [T]), where their latents go (`places` int64 [T], counted
    through all pages), and in which tiles they attend."""

    def __init__(
        self, spans: list[tuple[int, int]], tables: Tensor, page: int, config: TextConfig, device: torch.device
    ):
        """spans: first and end position of each sequence's new tokens, in packed order; sequences of similar shape
        should be neighbours, for only neighbours share a tile. tables int64 [sequences, pages] on the CPU: the page
        numbers of each sequence, and any page where it has no more."""
        begin, end = torch.tensor(spans).unbind(1)
        count = end - begin
        row = torch.repeat_interleave(count)
        positions = torch.arange(len(row)) + (begin + count - count.cumsum(0))[row]
        self.positions = positions.to(device)
        self.places = (tables[row, positions // page] * page + positions % page).to(device)
        self.tiles: list[CacheTile] = []
        largest = _tile_numbers(device)
        members: list[tuple[int, int, int]] = []
        longest = total = at = 0
        for piece in _pieces(spans):
            _, a, b = piece
            new = b - a
            if members:
                width, rows, seen = members[0][2] - members[0][1], len(members) + 1, max(longest, b)
                numbers = rows * seen * (config.kv_lora_rank + config.qk_rope_head_dim + config.num_heads * new)
                # Padding to the longest may cost a quarter of the work, or about what one more tile costs.
                if new != width or numbers > largest or rows * seen > 1.25 * (total + b) + 1024:
                    at = self._close(members, at, tables, page, device)
                    members, longest, total = [], 0, 0
            members.append(piece)
            longest, total = max(longest, b), total + b
        self._close(members, at, tables, page, device)

    def _close(
        self, members: list[tuple[int, int, int]], at: int, tables: Tensor, page: int, device: torch.device
    ) -> int:
        rows, new = len(members), members[0][2] - members[0][1]
        sequence, begin, end = torch.tensor(members).unbind(1)
        seen, first = int(end.max()), int(begin.min()) + 1
        hidden = None
        if first < seen:
            last = begin[:, None] + torch.arange(new)
            hidden = (torch.arange(first, seen) > last[:, :, None, None]).to(device)
        pages = tables[sequence, : -(-seen // page)].flatten().to(device)
        self.tiles.append(CacheTile(slice(at, at + rows * new), rows, pages, seen, hidden))
        return at + rows * new


def _pieces(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(sequence, first, end position) of at most _PIECE new tokens each."""
    for i, (a, b) in enumerate(spans):
        for start in range(a, b, _PIECE):
            yield i, start, min(start + _PIECE, b)
