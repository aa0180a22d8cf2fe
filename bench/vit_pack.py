"""MoonViT-3D forward and backward on pictures of mixed sizes, packed (ours), against two peers of equal weights: the
same tower on one batch padded to the largest picture, and transformers' `kimi_k25` tower, which attends picture by
picture. Interleaved rounds, medians of pictures a second; features and gradients of all three compared.
"""

import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from baltoro.model.config import VisionConfig
from baltoro.model.rope import rotate
from baltoro.model.vit import Block, Encoder, Grid, VisionTower, rope_2d

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
import oracle

CONFIG = VisionConfig(
    patch_size=14,
    hidden_size=384,
    num_layers=6,
    num_heads=6,
    intermediate_size=1536,
    pos_emb_height=64,
    pos_emb_width=64,
)
PICTURES, LARGEST, ROUNDS = 8, 576, 4


class PaddedEncoder(nn.Module):
    """The blocks of a tower on [pictures, longest, D], padding hidden from attention."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, grids: list[Grid]) -> Tensor:
        sizes = [t * h * w for t, h, w in grids]
        rotation = rope_2d(grids, self.encoder.head_dim, x.device, torch.float32)
        rotation = pad_sequence(rotation.split(sizes), batch_first=True)
        x = pad_sequence(x.split(sizes), batch_first=True)
        seen = torch.arange(x.shape[1]) < torch.tensor(sizes)[:, None]
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            q, k, v = block.wqkv(block.norm0(x)).unflatten(-1, (3, block.heads, -1)).unbind(2)
            q, k = rotate(q, rotation), rotate(k, rotation)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
            x = x + block.wo(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm1(x))
        return self.encoder.final_layernorm(x)[seen]


def mixed_grids() -> list[Grid]:
    """One picture of LARGEST patches, the others log-uniform from 64 to that, sides up to 2 : 1."""
    rng = random.Random(0)
    grids: list[Grid] = [(1, 32, LARGEST // 32)]
    while len(grids) < PICTURES:
        area, aspect = 64 * (LARGEST / 64) ** rng.random(), 2 ** rng.uniform(-1, 1)
        h, w = (2 * max(1, round(side / 2)) for side in ((area * aspect) ** 0.5, (area / aspect) ** 0.5))
        if h * w <= LARGEST:
            grids.append((1, h, w))
    return grids


def main() -> None:
    grids = mixed_grids()
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(h * w for _, h, w in grids), 3, 14, 14, generator=generator)
    packed = VisionTower(CONFIG)
    for p in packed.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, p[0].numel() ** -0.5 if p.dim() > 1 else 0.02, generator)
    padded = copy.deepcopy(packed)
    padded.encoder = PaddedEncoder(padded.encoder)
    theirs = oracle.vision_oracle(packed, CONFIG, torch.float32)
    forward: dict[str, Callable[[Tensor], Tensor]] = {
        "packed": lambda x: packed(x, grids),
        "padded": lambda x: padded(x, grids),
        "transformers": lambda x: theirs(x, grid_thw=torch.tensor(grids)).pooler_output,
    }
    weights = torch.randn(len(patches) // 4, 4, CONFIG.hidden_size, generator=generator)
    results: dict[str, tuple[Tensor, Tensor]] = {}
    times: dict[str, list[float]] = {name: [] for name in forward}
    for _ in range(1 + ROUNDS):
        for name, tower in forward.items():
            x = patches.clone().requires_grad_()
            begin = time.perf_counter()
            features = tower(x)
            (features * weights).sum().backward()
            times[name].append(time.perf_counter() - begin)
            assert x.grad is not None
            results[name] = (features.detach(), x.grad)
    error = max(
        float((mine - other).norm() / mine.norm())
        for name in ("padded", "transformers")
        for mine, other in zip(results["packed"], results[name], strict=True)
    )
    assert error < 1e-4, error
    rates = {name: PICTURES / statistics.median(rounds[1:]) for name, rounds in times.items()}  # the first warms up
    peer = max(rates["padded"], rates["transformers"])
    record = {"ours": rates["packed"], "peer": peer, "ratio": rates["packed"] / peer, "unit": "pictures a second"}
    record |= {"padded": rates["padded"], "transformers": rates["transformers"], "relative_error": error}
    longest = max(h * w for _, h, w in grids)
    record |= {"pictures": PICTURES, "patches": len(patches), "padded_patches": PICTURES * longest}
    print(json.dumps({**record, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
