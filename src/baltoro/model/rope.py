"""Rotary positions of the language model: interleaved pairs, optionally stretched by YaRN."""

import math

import torch
from torch import Tensor

from baltoro.model.config import TextConfig, Yarn
from baltoro.model.layers import wide


def yarn_correction_range(dim: int, theta: float, yarn: Yarn) -> tuple[int, int]:
    """First and last frequency index of the ramp between extrapolation and interpolation (8 and 20 for K2.5)."""

    def index(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(index(yarn.beta_fast)), math.ceil(index(yarn.beta_slow))
    return max(low, 0), min(high, dim - 1)


def inverse_frequencies(config: TextConfig) -> Tensor:
    """float64 [qk_rope_head_dim / 2]."""
    dim = config.qk_rope_head_dim
    plain = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if config.yarn is None:
        return plain
    low, high = yarn_correction_range(dim, config.rope_theta, config.yarn)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / config.yarn.factor * ramp


def softmax_scale(config: TextConfig) -> float:
    """qk_head_dim^-0.5, times YaRN's (0.1 ln factor + 1)^2; the scale of S_h in QK-Clip too."""
    mscale = 0.1 * math.log(config.yarn.factor) + 1 if config.yarn else 1.0
    return config.qk_head_dim**-0.5 * mscale * mscale


def rotations(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """positions int [tokens] -> complex e^(i angle) [tokens, rope_dim / 2], of the wide dtype of `dtype`."""
    angle = positions.to(wide(dtype))[:, None] * inv_freq.to(wide(dtype))
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate adjacent channel pairs: one complex product. x [..., heads, dim]; rotation [..., dim / 2] without the head
    axis."""
    pairs = torch.view_as_complex(x.to(rotation.real.dtype).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(-2)).flatten(-2).to(x.dtype)
