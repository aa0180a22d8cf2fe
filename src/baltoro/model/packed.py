"""Attention over packed sequences, without padding and without a score matrix that outlives its tile.

Shape legend: T packed tokens, H heads, D query/key head dim, V value head dim.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from baltoro.model.layers import wide

# A tile has at most this many queries (its scores then stay in the processor's cache), and neighbouring short segments
# share a tile up to this many tokens (a tile costs some ten kernel calls, however small). Measured.
_TILE, _SHARED = 128, 96


@dataclass(frozen=True)
class Tile:
    """Queries [begin, end) against keys [first, last) of the packed sequence. `mask` [n, n] holds -inf where one of the
    tile's last n keys is hidden, else 0; every other key of the tile is visible to every query."""

    begin: int
    end: int
    first: int
    last: int
    mask: Tensor


class Segments:
    """Which tokens of a packed sequence may see each other: contiguous segments that never attend across."""

    def __init__(self, lengths: list[int], device: torch.device | None = None):
        self.lengths = lengths
        self.device = device
        self.total = sum(lengths)
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)

    @cached_property
    def ends(self) -> Tensor:
        """int32 [segments + 1], cumulative lengths (cu_seqlens)."""
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0, dtype=torch.int32)

    @cached_property
    def tiles(self) -> list[Tile]:
        """For causal attention."""
        tiles: list[Tile] = []
        future = torch.full((_TILE, _TILE), float("-inf"), device=self.device).triu(1)
        start = 0
        for members in self._shared():
            stop = start + sum(members)
            if len(members) > 1:
                owner = torch.repeat_interleave(torch.tensor(members)).to(self.device)
                mask = (owner[:, None] != owner).float().masked_fill_(owner[:, None] != owner, float("-inf"))
                tiles.append(Tile(start, stop, start, stop, mask + future[: len(mask), : len(mask)]))
            else:
                for begin in range(start, stop, _TILE):
                    end = min(begin + _TILE, stop)
                    n = end - begin
                    tiles.append(Tile(begin, end, start, end, future[:n, :n]))
            start = stop
        return tiles

    def _shared(self) -> list[list[int]]:
        """The lengths in order, cut into runs of neighbours that share a tile."""
        runs: list[list[int]] = []
        for length in self.lengths:
            if runs and sum(runs[-1]) + length <= _SHARED:
                runs[-1].append(length)
            else:
                runs.append([length])
        return runs


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float, max_logits: Tensor | None = None
) -> Tensor:
    """q, k [T, H, D], v [T, H, V] -> [T, H, V]. `max_logits` [H], of causal attention alone, is raised in place to the
    largest visible logit."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if max_logits is not None:
            _raise_max_logits(max_logits, q, k, segments.tiles, scale)
        return _flash(q, k, v, segments, causal, scale)
    if causal:
        return _TiledAttention.apply(q, k, v, segments.tiles, scale, max_logits)  # pyright: ignore[reportReturnType]
    return _segment_by_segment(q, k, v, segments, scale)


def _segment_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """PyTorch's fused kernel, which is the faster one where every query sees every key of its segment. In the wide
    dtype: its backward pass on the CPU takes four times as long in bfloat16 as in float32. Measured."""
    parts = zip(*(x.to(wide(x.dtype)).transpose(0, 1).split(segments.lengths, 1) for x in (q, k, v)), strict=True)
    out = [F.scaled_dot_product_attention(a[None], b[None], c[None], scale=scale)[0] for a, b, c in parts]
    return torch.cat(out, 1).transpose(0, 1).to(v.dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float) -> Tensor:
    """FlashAttention's kernel for packed sequences, which wants one head dim, a multiple of 8."""
    width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    q, k, padded = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    ends, longest = segments.ends, max(segments.lengths)
    window = (-1, 0 if causal else -1)
    out = varlen_attn(q, k, padded, ends, ends, longest, longest, scale=scale, window_size=window)
    assert isinstance(out, Tensor)
    return out[..., : v.shape[-1]]


def _logits(q: Tensor, k: Tensor, tile: Tile, scale: float) -> Tensor:
    """[H, n, keys] of one tile; q, k are heads first."""
    q, k = q[:, tile.begin : tile.end], k[:, tile.first : tile.last]
    logits = _product(q, k.mT, scale)
    logits[..., -len(tile.mask) :] += tile.mask
    return logits


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


@torch.no_grad()
def _raise_max_logits(max_logits: Tensor, q: Tensor, k: Tensor, tiles: list[Tile], scale: float) -> None:
    for tile in tiles:
        top = _logits(q.transpose(0, 1), k.transpose(0, 1), tile, scale).amax((1, 2))
        torch.maximum(max_logits, top.to(max_logits.dtype), out=max_logits)


class _TiledAttention(torch.autograd.Function):
    """softmax(scale q k^T) v tile by tile. Only the inputs are kept: the backward pass computes the probabilities
    again, which costs one product in five and leaves nothing of quadratic size."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile], scale: float, max_logits: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale = tiles, scale
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        for tile in tiles:
            logits = _logits(q, k, tile, scale)
            if max_logits is not None:
                top = logits.amax((1, 2)).to(max_logits.dtype)
                torch.maximum(max_logits, top, out=max_logits)
            weights = logits.softmax(-1)
            out.transpose(0, 1)[:, tile.begin : tile.end] = weights @ v[:, tile.first : tile.last]
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in saved)
        q, k, v, grad, dq_, dk_, dv_ = (x.transpose(0, 1) for x in (*saved, gradients[0], dq, dk, dv))
        for tile in ctx.tiles:
            queries, keys = slice(tile.begin, tile.end), slice(tile.first, tile.last)
            logits = _logits(q, k, tile, ctx.scale)
            weights = logits.softmax(-1)
            dv_[:, keys] += weights.mT @ grad[:, queries]
            dweights = grad[:, queries] @ v[:, keys].mT
            dlogits = dweights.sub_(torch.linalg.vecdot(weights, dweights)[..., None]).mul_(weights)
            dq_[:, queries] = _product(dlogits, k[:, keys], ctx.scale)
            dk_[:, keys] += _product(dlogits.mT, q[:, queries], ctx.scale)
        return dq, dk, dv, None, None, None
