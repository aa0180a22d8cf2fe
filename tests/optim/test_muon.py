"""torch.optim.Muon and torch.optim.AdamW as oracles."""

import pytest
import torch
from torch import Tensor, nn

from baltoro.optim.muon import MuonAdamW, MuonConfig, orthogonalize, uses_muon

FREE = MuonConfig(clip_norm=1e9)


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_matrix_follows_torch_muon(shape: tuple[int, int]) -> None:
    start = _randn(0, *shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    oracle = torch.optim.Muon([theirs], weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    optimizer = MuonAdamW([("w", ours)], FREE)
    for step in range(6):
        lr = 0.02 / (step + 1)
        gradient = _randn(step + 1, *shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        optimizer.step(lr)
    moved = theirs.detach() - start
    # Both iterate in bfloat16, from inputs of another scale: what they round differs by about 2 % of the path.
    assert float((ours.detach() - theirs.detach()).norm() / moved.norm()) < 0.03
    assert float(moved.norm()) > 0.1


def test_vectors_and_embeddings_follow_torch_adamw() -> None:
    shapes = {"norm.weight": (8,), "model.embed_tokens.weight": (6, 8), "lm_head.weight": (6, 8)}
    ours = {name: nn.Parameter(_randn(7, *shape)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    oracle = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = MuonAdamW(ours.items(), FREE)
    for step in range(6):
        for name, shape in shapes.items():
            gradient = _randn(10 * step, *shape)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        oracle.param_groups[0]["lr"] = 0.01 * (step + 1)
        oracle.step()
        optimizer.step(0.01 * (step + 1))
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_orthogonalised_singular_values(shape: tuple[int, int]) -> None:
    # training.md section 3: these coefficients end in [0.68, 1.20] and not at 1.
    x = _randn(3, *shape)
    left, singular, right = torch.linalg.svd(orthogonalize(x, dtype=torch.float32), full_matrices=False)
    assert 0.67 < float(singular.min()) < float(singular.max()) < 1.21
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(
        left @ torch.diag(singular) @ right,
        u @ torch.diag(torch.diagonal(u.T @ orthogonalize(x, dtype=torch.float32) @ v.T)) @ v,
        atol=1e-4,
        rtol=1e-3,
    )


def test_stack_of_experts_equals_each_alone() -> None:
    start = _randn(0, 5, 12, 20)
    stack = nn.Parameter(start.clone())
    alone = [nn.Parameter(w.clone()) for w in start]
    together = MuonAdamW([("experts.up_proj", stack)], FREE, torch.float32)
    apart = [MuonAdamW([("w", p)], FREE, torch.float32) for p in alone]
    for step in range(3):
        gradient = _randn(step + 1, 5, 12, 20)
        gradient[2] = 0  # an idle expert only decays
        stack.grad = gradient.clone()
        together.step(0.05)
        for p, optimizer, g in zip(alone, apart, gradient, strict=True):
            p.grad = g.clone()
            optimizer.step(0.05)
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stack.detach()[2], start[2] * (1 - 0.05 * 0.1) ** 3)


def test_update_has_the_rms_of_adamw() -> None:
    w = nn.Parameter(torch.zeros(64, 256))
    w.grad = _randn(1, 64, 256)
    MuonAdamW([("w", w)], FREE).step(1.0)
    # 0.2 by design, times the 0.7 to 1.2 of the iteration.
    assert 0.7 * 0.2 < float(w.detach().square().mean().sqrt()) < 1.2 * 0.2


def test_gradients_are_clipped_globally_before_the_momentum() -> None:
    matrix, vector = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4))
    optimizer = MuonAdamW([("w", matrix), ("b", vector)], MuonConfig(clip_norm=1.0))
    matrix.grad, vector.grad = torch.zeros(3, 4), torch.zeros(4)
    matrix.grad[0, 0], vector.grad[0] = 3.0, 4.0
    assert optimizer.step(0.1) == pytest.approx(5.0)
    assert matrix.grad is None
    assert float(optimizer.state["w.momentum"][0, 0]) == pytest.approx(0.6, rel=1e-5)
    assert float(optimizer.state["b.exp_avg"][0]) == pytest.approx(0.8 * 0.1, rel=1e-5)
    matrix.grad, vector.grad = torch.zeros(3, 4), torch.zeros(4)
    matrix.grad[0, 0] = 0.5  # below the norm: taken as it is
    assert optimizer.step(0.1) == pytest.approx(0.5)
    assert float(optimizer.state["w.momentum"][0, 0]) == pytest.approx(0.95 * 0.6 + 0.5, rel=1e-5)


def test_convolution_is_one_matrix_and_frozen_parameters_stay() -> None:
    start = _randn(0, 10, 3, 2, 2)
    kernel, flat = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    frozen = nn.Parameter(_randn(5, 4, 4), requires_grad=False)
    before = frozen.clone()
    ours = MuonAdamW([("patch_embed.proj.weight", kernel), ("frozen", frozen)], FREE, torch.float32)
    plain = MuonAdamW([("w", flat)], FREE, torch.float32)
    gradient = _randn(1, 10, 3, 2, 2)
    kernel.grad, flat.grad = gradient.clone(), gradient.flatten(1).clone()
    ours.step(0.1)
    plain.step(0.1)
    torch.testing.assert_close(kernel.detach().flatten(1), flat.detach())
    assert torch.equal(frozen, before)
    assert not any("frozen" in name for name in ours.state)


@pytest.mark.parametrize(
    ("name", "shape", "muon"),
    [
        ("language_model.model.layers.1.mlp.experts.gate_proj", (8, 4, 4), True),
        ("language_model.model.layers.1.mlp.gate.weight", (8, 4), True),
        ("language_model.model.embed_tokens.weight", (8, 4), False),
        ("language_model.lm_head.weight", (8, 4), False),
        ("vision_tower.patch_embed.pos_emb.weight", (8, 8, 4), False),
        ("vision_tower.encoder.blocks.0.wqkv.weight", (12, 4), True),
        ("mm_projector.proj.0.bias", (4,), False),
    ],
)
def test_who_takes_what(name: str, shape: tuple[int, ...], muon: bool) -> None:
    assert uses_muon(name, torch.zeros(shape)) is muon
