"""MoonViT-3D against a reference written per item: dense attention, rope as complex numbers with the column first."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baltoro.model.config import NANO
from baltoro.model.vit import Block, Grid, Projector, VisionTower

CONFIG = dataclasses.replace(
    NANO.vision,
    patch_size=4,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=40,
    pos_emb_height=6,
    pos_emb_width=6,
)
TEXT_HIDDEN = 24


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    generator = torch.Generator().manual_seed(0)
    module = VisionTower(CONFIG).requires_grad_(False)
    for p in module.parameters():
        p.normal_(0, 0.25, generator=generator)
    return module


@pytest.fixture(scope="module")
def projector() -> Projector:
    generator = torch.Generator().manual_seed(1)
    module = Projector(CONFIG, TEXT_HIDDEN).requires_grad_(False)
    for p in module.parameters():
        p.normal_(0, 0.25, generator=generator)
    return module


def _patches(seed: int, *grids: Grid) -> Tensor:
    n = sum(t * h * w for t, h, w in grids)
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def _cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, x = -0.75, abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def _resize_matrix(size: int, old: int) -> np.ndarray:
    """Bicubic, half-pixel centres, borders repeated, no antialiasing."""
    matrix = np.zeros((size, old))
    for i in range(size):
        centre = (i + 0.5) * old / size - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), old - 1)] += _cubic(centre - j)
    return matrix


def _norm(x: np.ndarray, module: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * module.weight.numpy() + module.bias.numpy()


def _linear(x: np.ndarray, module: nn.Module) -> np.ndarray:
    assert isinstance(module, nn.Linear)
    return x @ module.weight.numpy().T.astype(np.float64) + module.bias.numpy()


def _reference(tower: VisionTower, patches: Tensor, grid: Grid) -> np.ndarray:
    """One item -> [media tokens, 4, D] in float64."""
    t, h, w = grid
    dim, heads = CONFIG.hidden_size, CONFIG.num_heads
    head_dim = dim // heads
    weight = tower.patch_embed.proj.weight.numpy().reshape(dim, -1).astype(np.float64)
    bias = tower.patch_embed.proj.bias
    assert bias is not None
    x = patches.numpy().reshape(len(patches), -1) @ weight.T + bias.numpy()
    table = tower.patch_embed.pos_emb.weight.numpy().astype(np.float64)
    plane = np.einsum("ia,jb,abd->ijd", _resize_matrix(h, 6), _resize_matrix(w, 6), table)
    angle = np.zeros((t, h, w, head_dim // 2))
    for frame in range(t):
        time = np.zeros(dim)
        if t > 1:
            for i in range(dim // 2):
                time[i] = math.sin(frame * 10000 ** (-2 * i / dim))
                time[dim // 2 + i] = math.cos(frame * 10000 ** (-2 * i / dim))
        for row in range(h):
            for column in range(w):
                x[(frame * h + row) * w + column] += plane[row, column] + time
                for k in range(head_dim // 4):
                    angle[frame, row, column, 2 * k] = column * 10000 ** (-4 * k / head_dim)
                    angle[frame, row, column, 2 * k + 1] = row * 10000 ** (-4 * k / head_dim)
    turn = np.exp(1j * angle.reshape(t * h * w, -1))
    for block in tower.encoder.blocks:
        assert isinstance(block, Block)
        qkv = _linear(_norm(x, block.norm0), block.wqkv)
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, part * dim + head * head_dim :][:, :head_dim] for part in range(3))
            q, k = ((y[:, 0::2] + 1j * y[:, 1::2]) * turn for y in (q, k))
            scores = (q @ k.conj().T).real / math.sqrt(head_dim)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + _linear(np.concatenate(outputs, -1), block.wo)
        hidden = _linear(_norm(x, block.norm1), block.mlp.fc0)
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + _linear(hidden, block.mlp.fc1)
    x = _norm(x, tower.encoder.final_layernorm).reshape(t, h, w, dim)
    cells = [
        np.stack([x[:, 2 * i + a, 2 * j + b].mean(0) for a in range(2) for b in range(2)])
        for i in range(h // 2)
        for j in range(w // 2)
    ]
    return np.stack(cells)


@pytest.mark.parametrize("grid", [(1, 6, 6), (1, 2, 8), (1, 10, 4), (2, 4, 6), (4, 2, 2)])
def test_tower_equals_the_reference(tower: VisionTower, grid: Grid) -> None:
    patches = _patches(2, grid)
    got = tower(patches, [grid])
    np.testing.assert_allclose(got.numpy(), _reference(tower, patches, grid), atol=2e-5)


def test_projector_normalises_patches_then_concatenates(projector: Projector) -> None:
    x = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(3))
    first, _, second = projector.proj
    wide = _norm(x.numpy().astype(np.float64), projector.pre_norm).reshape(5, 128)
    hidden = _linear(wide, first)
    gelu = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    np.testing.assert_allclose(projector(x).numpy(), _linear(gelu, second), atol=1e-4)


def test_packing_order_and_mates_do_not_matter(tower: VisionTower) -> None:
    grids: list[Grid] = [(1, 4, 6), (3, 2, 4), (1, 4, 6), (1, 2, 2)]
    items = [_patches(10 + i, grid) for i, grid in enumerate(grids)]
    alone = [tower(item, [grid]) for item, grid in zip(items, grids, strict=True)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        packed = tower(torch.cat([items[i] for i in order]), [grids[i] for i in order])
        torch.testing.assert_close(packed, torch.cat([alone[i] for i in order]), atol=2e-5, rtol=1e-4)


def test_frames_of_a_chunk_attend_jointly(tower: VisionTower) -> None:
    """A chunk is not the mean of its frames encoded alone: changing the last frame must reach every pooled cell."""
    grid = (3, 4, 4)
    patches = _patches(5, grid)
    other = patches.clone()
    other[-1] += 1.0  # one corner patch of the last frame
    difference = (tower(patches, [grid]) - tower(other, [grid])).abs().amax(-1)
    assert float(difference.min()) > 1e-4


def test_too_many_frames_are_refused(tower: VisionTower) -> None:
    with pytest.raises(ValueError, match="at most 4 frames"):
        tower(_patches(6, (5, 2, 2)), [(5, 2, 2)])
