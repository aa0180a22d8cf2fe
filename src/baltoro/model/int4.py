"""INT4 of the routed experts as released: signed four-bit steps, one bfloat16 scale per 32 weights along the input.

Weight = step * scale, step in -8..7; eight steps to an int32, the lowest nibble first, each stored as step + 8
(compressed-tensors "pack-quantized", symmetric, group 32).
"""

import torch
from torch import Tensor

GROUP = 32
# The smallest normal bfloat16: below it a scale would lose its own digits. A group of zeros gets it too.
_TINY = 2.0**-126
_LARGEST = torch.finfo(torch.bfloat16).max


def pack(steps: Tensor) -> Tensor:
    """int8 [out, in] of -8..7 -> int32 [out, in / 8]."""
    low, high = (steps + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int32 [out, in / 8] -> int8 [out, in]."""
    pairs = packed.view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).to(torch.int8) - 8


def dequantise(steps: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in], bfloat16 [out, in / 32] -> float32 [out, in]; exact, as a product has 12 significant bits."""
    return (steps.unflatten(-1, (-1, GROUP)) * scale.float()[..., None]).flatten(-2)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] of any float dtype -> int8 steps [out, in] and bfloat16 scale [out, in / 32].

    The scale is the smallest that holds the group: max(largest / 7, smallest / -8). No weight is clipped, so that each
    is kept within half a scale; the minmax observer of compressed-tensors (largest magnitude / 7.5) would clip, and
    never give back the scale of weights that it has quantised itself. Weights that came from INT4 come back exactly: in
    float32 if their group reaches 7 or -8, then with its steps and scale; after they were rounded to bfloat16, if some
    weight of the group is a single step. Raises ValueError for weights that are not finite.
    """
    groups = weight.float().contiguous().unflatten(-1, (-1, GROUP))
    smallest, largest = groups.aminmax(dim=-1)
    scale = torch.maximum(largest / 7, smallest / -8).clamp_min(_TINY).bfloat16().float()
    if not scale.isfinite().all():
        raise ValueError("weights are not finite")
    steps = _steps(groups, scale)
    exact = (steps * scale[..., None] == groups).all(-1)
    single = groups.abs().masked_fill(groups == 0, float("inf")).amin(-1).clamp(_TINY, _LARGEST).bfloat16().float()
    others = _steps(groups, single)
    single_fits = ~exact & ((others * single[..., None]).bfloat16() == groups.bfloat16()).all(-1)
    steps = torch.where(single_fits[..., None], others, steps)
    return steps.to(torch.int8).flatten(-2), torch.where(single_fits, single, scale).bfloat16()


def _steps(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale[..., None]).round().clamp(-8, 7)
