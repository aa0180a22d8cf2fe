"""Mixture of experts with sigmoid scores and bias-only load balancing (DeepSeek-V3 "noaux_tc", as K2 uses it)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baltoro.model.config import TextConfig
from baltoro.model.layers import SwiGLU, wide


class Router(nn.Module):
    """Scores in the wide dtype; experts are chosen by score + bias, weighted by the score alone."""

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
        """x [T, dim] -> expert ids int64 [T, K] and weights [T, K] in the wide dtype."""
        dtype = wide(x.dtype)
        scores = F.linear(x.to(dtype), self.weight.to(dtype)).sigmoid()
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


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [rows, in] up to each of `ends` (int32 [n], cumulative) times their matrix of weights [n, in, out]."""
    if x.dtype == torch.float64:  # PyTorch has no such kernel
        parts = x.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
    return F.grouped_mm(x, weights, offs=ends)


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
        hidden = F.silu(grouped_mm(x, gate, ends)) * grouped_mm(x, up, ends)
        return grouped_mm(hidden, down, ends)


_ALIGN = 64


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
        count = torch.bincount(flat, minlength=self.experts.gate_proj.shape[0])
        # In training every step has other counts, and the CPU compiles a kernel for each new size of a product: groups
        # begin at multiples of _ALIGN, so that few sizes occur.
        room = -(-count // _ALIGN) * _ALIGN if self.training else count
        ends = room.cumsum(0)
        sorted_expert = flat[order]
        rank = torch.arange(order.numel(), device=x.device) - (count.cumsum(0) - count)[sorted_expert]
        place = torch.empty_like(order)
        place[order] = rank + (ends - room)[sorted_expert]
        gathered = x.new_zeros(int(ends[-1]), x.shape[-1]).index_copy(
            0, place[order], x.index_select(0, order // top_k)
        )
        routed = self.experts(gathered, ends.to(torch.int32)).index_select(0, place).view(-1, top_k, x.shape[-1])
        return (routed * weights.to(x.dtype)[..., None]).sum(1) + self.shared_experts(x)
