"""Eq. 1: the policy objective of K2.5."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ObjectiveConfig:
    """alpha and beta bound the ratio, so the log-ratio window is [log alpha, log beta] (the report writes both forms;
    only this reading is consistent). tau weighs the squared log-ratio."""

    alpha: float = 0.5
    beta: float = 2.0
    tau: float = 0.01


@dataclass(frozen=True)
class ObjectiveResult:
    """loss: to be minimised (the negative of Eq. 1 as printed). outside: share of tokens whose gradient is masked."""

    loss: Tensor
    outside: float
    mismatch: float


def policy_loss(
    policy_logprobs: Tensor, engine_logprobs: Tensor, advantages: Tensor, total: int, config: ObjectiveConfig
) -> ObjectiveResult:
    """Sum over tokens divided by `total`, the generated tokens of the whole batch. All tensors [tokens].

    Inside the window the policy term is ratio * advantage; outside its gradient is zero, whatever the sign of the
    advantage. The tau term acts on every token and pulls those outside back.
    """
    log_ratio = policy_logprobs - engine_logprobs
    low, high = math.log(config.alpha), math.log(config.beta)
    # clamp passes no gradient outside the window; before exp, so that no ratio overflows.
    clipped = log_ratio.clamp(low, high).exp()
    gain = clipped * advantages - config.tau * log_ratio.square()
    with torch.no_grad():
        outside = ((log_ratio < low) | (log_ratio > high)).float().mean().item()
        mismatch = log_ratio.abs().mean().item()
    return ObjectiveResult(-gain.sum() / total, outside, mismatch)


def group_advantages(rewards: list[float]) -> list[float]:
    """r - mean(r) over the K responses to one task; no division by the deviation."""
    mean = sum(rewards) / len(rewards)
    return [r - mean for r in rewards]
