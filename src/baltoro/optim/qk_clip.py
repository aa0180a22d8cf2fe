"""QK-Clip (K2 report, MuonClip): bound every head's attention logits by rescaling its query and key rows."""

import torch
from torch import Tensor


@torch.no_grad()
def qk_clip(
    q_weight: Tensor, kv_weight: Tensor, max_logits: Tensor, nope: int, rope: int, v: int, threshold: float = 100.0
) -> int:
    """Scale rows in place where a head's S_h exceeded `threshold`; returns the number of clipped heads.

    q_weight [heads * (nope + rope), in] and kv_weight [heads * (nope + v), in], head-major; max_logits [heads] is the
    largest visible softmax_scale * q.k of the step. Nope rows of query and key take sqrt(gamma), rope rows of the
    query take gamma; the shared rope key and the values stay. `max_logits` is reset to -inf for the next step.
    """
    heads = max_logits.numel()
    gamma = (threshold / max_logits).where(max_logits > threshold, torch.ones_like(max_logits))
    clipped = int((gamma < 1).sum())
    if clipped:
        q = q_weight.view(heads, nope + rope, -1)
        kv = kv_weight.view(heads, nope + v, -1)
        root = gamma.sqrt()[:, None, None]
        q[:, :nope] *= root
        q[:, nope:] *= gamma[:, None, None]
        kv[:, :nope] *= root
    max_logits.fill_(float("-inf"))
    return clipped
