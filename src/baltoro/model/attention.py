"""MLA over packed documents and over a cache.

Shape legend: T packed tokens, H heads, R kv_lora_rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baltoro.model.config import TextConfig
from baltoro.model.layers import Linear, RMSNorm
from baltoro.model.packed import Segments, segment_attention
from baltoro.model.rope import rotate, softmax_scale


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

    def queries(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """[T, dim] -> nope part [T, H, nope] and rotated part [T, H, rope]."""
        c = self.config
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        nope, rope = q.view(-1, c.num_heads, c.qk_head_dim).split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        return nope, rotate(rope, rotation)

    def latents(self, x: Tensor, rotation: Tensor) -> Tensor:
        """[T, dim] -> what the cache holds per token: normed latent and rotated shared key, [T, R + rope]."""
        latent, rope = self.kv_a_proj_with_mqa(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(rope[:, None], rotation)[:, 0]), -1)

    def forward(self, x: Tensor, rotation: Tensor, segments: Segments) -> Tensor:
        """x [T, dim] of packed documents -> [T, dim]."""
        c = self.config
        q_nope, q_rope = self.queries(x, rotation)
        latent, k_rope = self.latents(x, rotation).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
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

    def extend(self, x: Tensor, rotation: Tensor, cache: Tensor, plan: "CachePlan") -> Tensor:
        """New tokens against cached latents, with kv_b absorbed into query and output, so that the cache is never
        decompressed. x [T, dim] packed new tokens; cache [pages, page, R + rope], written at the tokens' places.
        Returns [T, dim]. No gradients."""
        c = self.config
        cache.view(-1, cache.shape[-1]).index_copy_(0, plan.places, self.latents(x, rotation))
        q_nope, q_rope = self.queries(x, rotation)
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
