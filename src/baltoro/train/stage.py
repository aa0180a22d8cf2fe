"""One loop for every stage that descends a loss: ViT, joint pre-training, long context, SFT (Table 3, 4.4.1)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from baltoro.data.mixture import Mixture
from baltoro.model.attention import MLA
from baltoro.model.kimi import KimiK25, routers
from baltoro.optim.muon import MuonAdamW, MuonConfig
from baltoro.optim.qk_clip import qk_clip
from baltoro.optim.schedule import wsd
from baltoro.train.losses import next_token_loss
from baltoro.train.machine import trim_memory
from baltoro.train.packing import TrainingBatch, pack
from baltoro.train.parallel import ALONE, Group
from baltoro.train.state import Progress, load_state, save_state


@dataclass(frozen=True)
class StageConfig:
    """steps of `tokens` tokens each at peak learning rate `lr`. shares: share of tokens per data source. trains: name
    prefixes of the parameters that learn. recompute: activation checkpointing of the language model, layer by layer:
    half the memory for a fifth more time at 100M parameters."""

    steps: int
    tokens: int
    lr: float
    shares: dict[str, float]
    trains: tuple[str, ...] = ("language_model", "vision_tower", "mm_projector")
    warmup: int = 10
    decay: float = 0.3
    lr_floor: float = 0.1
    weight_decay: float = 0.1
    balance_rate: float = 1e-3
    save_every_s: float = 20.0
    recompute: bool = False


@dataclass(frozen=True)
class StepReport:
    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    clipped_heads: int


_TRIM_EVERY = 60


def optimizer_for(model: KimiK25, trains: tuple[str, ...], weight_decay: float, group: Group = ALONE) -> MuonAdamW:
    """MuonClip over the chosen parameters; the others are frozen. The processes of the group share the work."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trains))
    ns_dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
    return MuonAdamW(model.named_parameters(), MuonConfig(weight_decay=weight_decay), ns_dtype, group.divide)


def after_step(model: KimiK25, balance_rate: float) -> int:
    """What follows every optimiser step: QK-Clip and the router bias. Returns the number of clipped heads."""
    text = model.config.text
    clipped = 0
    for attn in (m for m in model.modules() if isinstance(m, MLA) and m.kv_b_proj.weight.requires_grad):
        q = attn.q_proj if text.q_lora_rank is None else attn.q_b_proj
        clipped += qk_clip(
            q.weight,
            attn.kv_b_proj.weight,
            attn.max_logits,
            text.qk_nope_head_dim,
            text.qk_rope_head_dim,
            text.v_head_dim,
        )
    for router in routers(model):
        router.balance(balance_rate if router.weight.requires_grad else 0.0)
    return clipped


def run_stage(
    name: str,
    model: KimiK25,
    config: StageConfig,
    mixture: Mixture,
    checkpoint: Path,
    report: Callable[[StepReport], None],
    group: Group = ALONE,
) -> Progress:
    """Train in place from wherever `checkpoint` stands; it is rewritten every `save_every_s` seconds and at the end.
    mixture: this process's share of every step's tokens; the first process of the group alone uses `checkpoint` and
    `report`, and the others begin as it does."""
    optimizer = optimizer_for(model, config.trains, config.weight_decay, group)
    progress = Progress(name, 0, 0.0, 0)
    leads = group.rank == 0
    if leads and checkpoint.exists():
        progress = load_state(checkpoint, model, optimizer)
    begun = torch.tensor([progress.step, progress.tokens, optimizer.step_count])
    group.share([begun, *model.state_dict().values(), *optimizer.state.values()])
    first, tokens, optimizer.step_count = begun.tolist()
    if first == config.steps:
        return progress
    model.train()
    model.language_model.model.recompute = config.recompute
    begin = time.monotonic() - progress.seconds
    saved = time.monotonic()
    for step in range(first, config.steps):
        batch = pack(mixture.batch(step), model.config.vision.patch_size)
        loss, seen = _descend(model, optimizer, batch, group)
        lr = config.lr * wsd(step, config.steps, config.warmup, round(config.decay * config.steps), config.lr_floor)
        norm = optimizer.step(lr)
        clipped = after_step(model, config.balance_rate)
        tokens += seen
        seconds = time.monotonic() - begin
        if leads:
            report(StepReport(step + 1, loss, norm, lr, tokens, seconds, clipped))
        progress = Progress(name, step + 1, seconds, tokens)
        if step % _TRIM_EVERY == 0:
            trim_memory()
        if leads and time.monotonic() - saved > config.save_every_s:
            save_state(checkpoint, model, optimizer, progress)
            saved = time.monotonic()
    if leads:
        save_state(checkpoint, model, optimizer, progress)
    return progress


def _descend(model: KimiK25, optimizer: MuonAdamW, batch: TrainingBatch, group: Group) -> tuple[float, int]:
    """Leave the gradients of the mean loss over all targets of the group, and what `after_step` goes by. Returns the
    loss and the number of tokens of the whole group."""
    loss = next_token_loss(model, batch)
    count = len(batch.targets)
    (loss * count).backward()
    for p in optimizer.params.values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads = [p.grad for p in optimizer.params.values() if p.grad is not None]
    sums = torch.tensor([loss.item() * count, count, batch.tokens])
    group.add([sums, *grads, *(router.load for router in routers(model))])
    group.raise_to_highest([m.max_logits for m in model.modules() if isinstance(m, MLA)])
    total, targets, tokens = sums.tolist()
    for grad in grads:
        grad /= targets
    return total / targets, int(tokens)
