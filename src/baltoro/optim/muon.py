"""Muon with RMS-matched updates (Moonlight, arXiv 2502.16982), and AdamW for the parameters where it belongs."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; x [..., m, n].

    Singular values end in about [0.7, 1.2], not at 1: the coefficients trade exactness for speed.
    """
    a, b, c = COEFFICIENTS
    tall, shape = x.shape[-2] > x.shape[-1], x.shape
    x = x.to(dtype).reshape(-1, *shape[-2:])
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


MatrixFunction = Callable[[Tensor], Tensor]
"""A function of each matrix of a stack [n, rows, columns] by itself."""


def each(function: MatrixFunction, stacks: list[Tensor]) -> list[Tensor]:
    """One process computes all."""
    return [function(stack) for stack in stacks]


@dataclass(frozen=True)
class MuonConfig:
    """One learning rate and one weight decay serve both halves, because the Muon update is matched to AdamW's RMS."""

    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    update_rms: float = 0.2
    clip_norm: float = 1.0


class MuonAdamW:
    """Matrices (and stacks of expert matrices) by Muon; embeddings, head, position table, norms and biases by AdamW.

    Raw gradients are clipped to a global norm before the momentum and never after orthogonalisation. State is a
    flat dictionary of tensors by parameter name, so that it is saved as it is. `divide`, called as `each` is, may let
    other processes orthogonalise some of the matrices.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        config: MuonConfig,
        ns_dtype: torch.dtype = torch.bfloat16,
        divide: Callable[[MatrixFunction, list[Tensor]], list[Tensor]] = each,
    ):
        self.config = config
        self.ns_dtype = ns_dtype
        self.divide = divide
        self.step_count = 0
        self.params = {name: p for name, p in named if p.requires_grad}
        self.state: dict[str, Tensor] = {}
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self.adamw: list[str] = []
        for name, p in self.params.items():
            if uses_muon(name, p):
                groups[tuple(p.shape[-2:]) if "patch_embed" not in name else (p.shape[0], p[0].numel())].append(name)
                self.state[f"{name}.momentum"] = torch.zeros_like(p)
            else:
                self.adamw.append(name)
                self.state[f"{name}.exp_avg"] = torch.zeros_like(p)
                self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(p)
        self.muon = list(groups.items())

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Apply one update with this learning rate; returns the gradient norm before clipping and clears gradients."""
        self.step_count += 1
        # A parameter that took no part (an idle expert's stack, a frozen tower) counts as zero gradient.
        grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in self.params.items()}
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()]))
        scale = min(1.0, self.config.clip_norm / (float(norm) + 1e-6))
        self._muon(grads, lr, scale)
        self._adamw(grads, lr, scale)
        for p in self.params.values():
            p.grad = None
        return float(norm)

    def _muon(self, grads: dict[str, Tensor], lr: float, scale: float) -> None:
        c = self.config
        stacks: list[Tensor] = []
        for shape, names in self.muon:
            directions: list[Tensor] = []
            for name in names:
                momentum = self.state[f"{name}.momentum"]
                momentum.mul_(c.momentum).add_(grads[name], alpha=scale)
                directions.append(grads[name].mul(scale).add(momentum, alpha=c.momentum).reshape(-1, *shape))
            stacks.append(torch.cat(directions))
        updates = self.divide(partial(orthogonalize, dtype=self.ns_dtype), stacks)
        for (shape, names), update in zip(self.muon, updates, strict=True):
            adjust = c.update_rms * max(shape) ** 0.5
            sizes = [self.params[name].numel() for name in names]
            for name, delta in zip(names, update.to(torch.float32).reshape(-1).split(sizes), strict=True):
                p = self.params[name]
                p.mul_(1 - lr * c.weight_decay).add_(delta.view_as(p), alpha=-lr * adjust)

    def _adamw(self, grads: dict[str, Tensor], lr: float, scale: float) -> None:
        (beta1, beta2), t = self.config.betas, self.step_count
        for name in self.adamw:
            p, grad = self.params[name], grads[name] * scale
            m, v = self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"]
            m.lerp_(grad, 1 - beta1)
            v.lerp_(grad.square(), 1 - beta2)
            denominator = (v / (1 - beta2**t)).sqrt_().add_(self.config.eps)
            p.mul_(1 - lr * self.config.weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1**t))


def uses_muon(name: str, p: Tensor) -> bool:
    """Hidden matrices; embeddings, the head, the learned position table and everything 0- or 1-D go to AdamW."""
    return p.dim() >= 2 and not any(word in name for word in ("embed_tokens", "lm_head", "pos_emb"))
