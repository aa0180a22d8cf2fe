"""One policy update from recorded traces."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baltoro.chat.messages import TokenSequence
from baltoro.model.kimi import KimiK25
from baltoro.optim.muon import MuonAdamW
from baltoro.rl.objective import ObjectiveConfig, policy_loss
from baltoro.train.losses import head_logprobs
from baltoro.train.packing import pack
from baltoro.train.stage import after_step


@dataclass(frozen=True, eq=False)
class Sample:
    """One trace as the trainer needs it: exact tokens, loss mask, the engine's log-probability of every token, and the
    age of the weights that it was drawn under, in versions (both anything where the mask is 0)."""

    sequence: TokenSequence
    engine_logprobs: Sequence[float]
    advantage: float
    ages: Sequence[int]


@dataclass(frozen=True)
class UpdateReport:
    """mismatch: mean of |policy_logprob - engine_logprob| over the sampled tokens before the step; mismatch_by_age: the
    same for the tokens of every age. policy_logprobs: of the marked tokens of each sample, before the step."""

    loss: float
    grad_norm: float
    outside: float
    mismatch: float
    mismatch_by_age: dict[int, float]
    tokens: int
    policy_logprobs: list[list[float]]


def update(
    model: KimiK25,
    optimizer: MuonAdamW,
    samples: Sequence[Sample],
    lr: float,
    config: ObjectiveConfig,
    micro_tokens: int,
) -> UpdateReport:
    """One MuonClip step on Eq. 1 over all samples, in micro-batches of about `micro_tokens` tokens.

    Samples without advantage still count in N and feel the tau term.
    """
    model.train()
    total = sum(sum(s.sequence.loss_mask) for s in samples)
    loss = outside = mismatch = 0.0
    recomputed: dict[int, list[float]] = {}
    gaps: defaultdict[int, list[Tensor]] = defaultdict(list)
    for micro in _micro_batches(samples, micro_tokens):
        batch = pack([s.sequence for s in micro], model.config.vision.patch_size)
        hidden = model(batch.batch).index_select(0, batch.sources)
        logprobs = head_logprobs(hidden, model.language_model.lm_head.weight, batch.targets)
        marked = [
            (p, s.advantage, age)
            for s in micro
            for p, age, m in zip(s.engine_logprobs, s.ages, s.sequence.loss_mask, strict=True)
            if m
        ]
        engine, advantages, ages = torch.tensor(marked).unbind(1)
        result = policy_loss(logprobs, engine, advantages, total, config)
        result.loss.backward()
        parts = logprobs.detach().split([sum(s.sequence.loss_mask) for s in micro])
        recomputed |= {id(s): part.tolist() for s, part in zip(micro, parts, strict=True)}
        gap = (logprobs.detach() - engine).abs()
        for age in ages.unique().tolist():
            gaps[int(age)].append(gap[ages == age])
        weight = len(marked) / total
        loss += result.loss.item()
        outside += result.outside * weight
        mismatch += result.mismatch * weight
    norm = optimizer.step(lr)
    after_step(model, balance_rate=0.0)
    policy_logprobs = [recomputed[id(sample)] for sample in samples]
    by_age = {age: torch.cat(gaps[age]).mean().item() for age in sorted(gaps)}
    return UpdateReport(loss, norm, outside, mismatch, by_age, total, policy_logprobs)


def _micro_batches(samples: Sequence[Sample], micro_tokens: int) -> list[list[Sample]]:
    """Samples of similar length together, so that little is padded."""
    out: list[list[Sample]] = []
    size = 0
    for sample in sorted(samples, key=lambda s: len(s.sequence.ids)):
        if not out or size + len(sample.sequence.ids) > micro_tokens:
            out.append([])
            size = 0
        out[-1].append(sample)
        size += len(sample.sequence.ids)
    return out
