"""MoonViT-3D (report 4.2) and the patch-merger projector. Names follow the released checkpoint.

Shape legend: N patches of all items, D vision width, t/h/w frames, rows and columns of one item in patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baltoro.model.config import VisionConfig
from baltoro.model.layers import LayerNorm, Linear, wide
from baltoro.model.packed import Segments, segment_attention
from baltoro.model.rope import rotate

Grid = tuple[int, int, int]


class PositionTable(nn.Module):
    """Learned 2-D table, bicubically resized to each item, plus fixed sincos over frames where t > 1."""

    time: Tensor

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.pos_emb_height, config.pos_emb_width, config.hidden_size))
        half = torch.arange(config.hidden_size // 2, dtype=torch.float64)
        angle = torch.arange(config.max_frames)[:, None] * 10000.0 ** (-2 * half / config.hidden_size)
        self.register_buffer("time", torch.cat((angle.sin(), angle.cos()), -1), persistent=False)

    def forward(self, grids: list[Grid], dtype: torch.dtype) -> Tensor:
        """-> [N, D] in `dtype`, computed in its wide dtype."""
        table, time = self.weight.to(wide(dtype)), self.time.to(wide(dtype))
        resized: dict[tuple[int, int], Tensor] = {}
        parts: list[Tensor] = []
        for t, h, w in grids:
            if (h, w) not in resized:
                plane = table
                if (h, w) != table.shape[:2]:
                    plane = F.interpolate(table.permute(2, 0, 1)[None], size=(h, w), mode="bicubic")[0].permute(1, 2, 0)
                resized[h, w] = plane.reshape(h * w, -1)
            plane = resized[h, w]
            # A single frame gets no time embedding at all, not its row 0.
            parts.append(plane if t == 1 else (plane[None] + time[:t, None]).flatten(0, 1))
        return torch.cat(parts).to(dtype)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.pos_emb = PositionTable(config)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """patches [N, 3, p, p] -> [N, D]; the convolution over one patch is a matrix product."""
        weight = self.proj.weight.flatten(1).to(patches.dtype)
        bias = self.proj.bias
        assert bias is not None
        return F.linear(patches.flatten(1), weight, bias.to(patches.dtype)) + self.pos_emb(grids, patches.dtype)


def rope_2d(grids: list[Grid], head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Complex [N, head_dim / 2]: pair 2k turns with the column, pair 2k + 1 with the row, all frames alike."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 4, dtype=dtype, device=device) / head_dim)
    planes: dict[tuple[int, int], Tensor] = {}
    angles: list[Tensor] = []
    for t, h, w in grids:
        if (h, w) not in planes:
            column = torch.arange(w, device=device).repeat(h)[:, None] * frequency
            row = torch.arange(h, device=device).repeat_interleave(w)[:, None] * frequency
            planes[h, w] = torch.stack((column, row), -1).flatten(-2)
        angles.append(planes[h, w].repeat(t, 1))
    angle = torch.cat(angles)
    return torch.polar(torch.ones_like(angle), angle)


class Mlp(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc0 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc1 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(F.gelu(self.fc0(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.norm0 = LayerNorm(config.hidden_size, config.norm_eps)
        self.wqkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.wo = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.norm1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, rotation: Tensor, segments: Segments) -> Tensor:
        q, k, v = self.wqkv(self.norm0(x)).view(len(x), 3, self.heads, -1).unbind(1)
        q, k = rotate(q, rotation), rotate(k, rotation)
        out = segment_attention(q, k, v, segments, causal=False, scale=q.shape[-1] ** -0.5)
        x = x + self.wo(out.flatten(-2))
        return x + self.mlp(self.norm1(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, grids: list[Grid]) -> Tensor:
        rotation = rope_2d(grids, self.head_dim, x.device, wide(x.dtype))
        segments = Segments([t * h * w for t, h, w in grids], x.device)
        for block in self.blocks:
            x = block(x, rotation, segments)
        return self.final_layernorm(x)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """patches [N, 3, p, p] of all items -> [media tokens, merge^2, D]: frames averaged, neighbours grouped."""
        if any(t > self.config.max_frames for t, _, _ in grids):
            raise ValueError(f"a clip chunk may hold at most {self.config.max_frames} frames")
        x = self.encoder(self.patch_embed(patches, grids), grids)
        m = self.config.merge
        out: list[Tensor] = []
        for (t, h, w), item in zip(grids, x.split([t * h * w for t, h, w in grids]), strict=True):
            cells = item.view(t, h // m, m, w // m, m, -1).mean(0) if t > 1 else item.view(h // m, m, w // m, m, -1)
            out.append(cells.permute(0, 2, 1, 3, 4).reshape(h // m * (w // m), m * m, -1))
        return torch.cat(out)


class Projector(nn.Module):
    """LayerNorm per patch, concatenate the merged patches, two linear layers with exact GELU between."""

    def __init__(self, vision: VisionConfig, text_hidden: int):
        super().__init__()
        wide = vision.hidden_size * vision.merge**2
        self.pre_norm = LayerNorm(vision.hidden_size, 1e-5)
        self.proj = nn.Sequential(Linear(wide, wide, bias=True), nn.GELU(), Linear(wide, text_hidden, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        """[media tokens, merge^2, D] -> [media tokens, text hidden]."""
        return self.proj(self.pre_norm(x).flatten(1))
