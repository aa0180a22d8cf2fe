"""Mixture of experts with sigmoid scores and bias-only load balancing (DeepSeek-V3 "noaux_tc", as K2 uses it)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baltoro.model.config import TextConfig
from baltoro.model.layers import SwiGLU


class Router(nn.Module):
    """Scores in float32; experts are chosen by score + bias, weighted by the score alone."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, dim] -> expert ids int64 [T, K] and weights float32 [T, K]."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling
        if self.training:
            self.load += torch.bincount(chosen.reshape(-1), minlength=self.load.numel())
        return chosen, weights

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """b += rate * (sign(e) - mean sign(e)) with e = mean load - load (Moonlight, appendix C); clears the load."""
        sign = (self.load.mean() - self.load).sign()
        self.e_score_correction_bias += rate * (sign - sign.mean())
        self.load.zero_()


class Experts(nn.Module):
    """All routed experts as three stacks, applied by grouped matrix products to tokens sorted by expert."""

    def __init__(self, config: TextConfig):
        super().__init__()
        n, dim, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(n, dim, hidden))
        self.up_proj = nn.Parameter(torch.empty(n, dim, hidden))
        self.down_proj = nn.Parameter(torch.empty(n, hidden, dim))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [rows, dim] sorted by expert, ends int32 [experts] cumulative row counts -> [rows, dim]."""
        gate, up, down = (w.to(x.dtype) for w in (self.gate_proj, self.up_proj, self.down_proj))
        hidden = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
        return F.grouped_mm(hidden, down, offs=ends)


class MoE(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.gate(x)
        top_k = chosen.shape[1]
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.experts.gate_proj.shape[0]).cumsum(0).to(torch.int32)
        rows = self.experts(x.index_select(0, order // top_k), ends)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        routed = rows.index_select(0, inverse).view(-1, top_k, x.shape[-1])
        return (routed * weights.to(x.dtype)[..., None]).sum(1) + self.shared_experts(x)
