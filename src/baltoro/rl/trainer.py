"""Reinforcement learning of one policy: rollouts by group, advantages against the group's mean, one Eq. 1 update.

Nothing here knows what the episodes are: a rollout is a coroutine that ends in a trace, a reward reads the trace's
signals. PARL is this loop with an orchestrator's traces and `ParlShaping`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from baltoro.agent.engine import Engine
from baltoro.agent.loop import derive_seed
from baltoro.agent.trace import Trace
from baltoro.chat.messages import TokenSequence
from baltoro.model.kimi import KimiK25
from baltoro.rl.objective import ObjectiveConfig, group_advantages
from baltoro.rl.update import Sample, UpdateReport, update
from baltoro.rollout.manager import Ended, ManagerConfig, RolloutManager, Running
from baltoro.serve.local import LocalEngine
from baltoro.train.machine import trim_memory
from baltoro.train.stage import optimizer_for
from baltoro.train.state import Progress, load_state, save_state

Rollout = Callable[[Engine, int, int], Awaitable[Trace]]
"""(engine, task seed, episode seed) -> the finished episode: the task follows from the first, the draw from both."""

Opened = Callable[[], AbstractAsyncContextManager[Rollout]]
"""Opens what the rollouts of one iteration need beside the running engine; gives the rollout."""


@dataclass(frozen=True)
class RLConfig:
    """iterations of `tasks` groups of `rollouts` episodes (K of Eq. 1)."""

    iterations: int
    tasks: int
    rollouts: int
    lr: float
    objective: ObjectiveConfig
    trains: tuple[str, ...] = ("language_model", "vision_tower", "mm_projector")
    weight_decay: float = 0.0
    micro_tokens: int = 8192


@dataclass(frozen=True, eq=False)
class IterationReport:
    """groups: the episodes of every task with their rewards, in order."""

    iteration: int
    groups: list[list[tuple[Trace, float]]]
    update: UpdateReport
    tokens: int
    seconds: float

    def mean_of(self, signal: str) -> float:
        """Over the episodes that have the signal."""
        values = [t.signals[signal] for group in self.groups for t, _ in group if signal in t.signals]
        return sum(values) / len(values) if values else 0.0

    def mean(self, value: Callable[[Trace], float]) -> float:
        traces = [trace for group in self.groups for trace, _ in group]
        return sum(map(value, traces)) / len(traces)

    @property
    def reward(self) -> float:
        rewards = [reward for group in self.groups for _, reward in group]
        return sum(rewards) / len(rewards)


def run_rl(
    name: str,
    model: KimiK25,
    policy_role: str,
    engine: LocalEngine,
    config: RLConfig,
    opened: Opened,
    reward: Callable[[Trace, int], float],
    seed: int,
    checkpoint: Path,
    report: Callable[[IterationReport], None],
) -> Progress:
    """Train `model` in place; `engine` serves it under `policy_role` and whatever is frozen under other roles.

    An iteration is a pure function of weights, seed and its number, so a run resumes exactly at the last finished one.
    """
    optimizer = optimizer_for(model, config.trains, config.weight_decay)
    progress = Progress(name, 0, 0.0, 0)
    if checkpoint.exists():
        progress = load_state(checkpoint, model, optimizer)
    begin = time.monotonic() - progress.seconds
    tokens = progress.tokens
    for iteration in range(progress.step, config.iterations):
        engine.update(policy_role, model)
        traces = asyncio.run(_roll_out(engine, config, opened, derive_seed(seed, iteration)))
        groups = [[(trace, reward(trace, iteration)) for trace in group] for group in traces]
        samples = [s for group in groups for s in _samples(group)]
        result = update(model, optimizer, samples, config.lr, config.objective, config.micro_tokens)
        tokens += sum(len(s.sequence.ids) for s in samples)
        progress = Progress(name, iteration + 1, time.monotonic() - begin, tokens)
        # Reported first: what is reported behind the checkpoint is dropped on resume, what is missing stays missing.
        report(IterationReport(iteration + 1, groups, result, tokens, progress.seconds))
        save_state(checkpoint, model, optimizer, progress)
        trim_memory()
    return progress


async def _roll_out(engine: LocalEngine, config: RLConfig, opened: Opened, seed: int) -> list[list[Trace]]:
    manager = RolloutManager(engine, ManagerConfig())

    async def submit(rollout: Rollout, group: int, k: int) -> Running:
        task = derive_seed(seed, group)
        return await manager.submit(f"{group}/{k}", lambda episode: rollout(episode, task, derive_seed(task, k)))

    async with engine.run(), opened() as rollout, manager.run():
        running = [[await submit(rollout, g, k) for k in range(config.rollouts)] for g in range(config.tasks)]
        return [[_trace(await episode.ended()) for episode in group] for group in running]


def _trace(ended: Ended) -> Trace:
    if ended.trace is None or ended.outcome == "failed":  # the engine is ours: its failure is no property of the policy
        raise RuntimeError(f"a rollout failed: {ended.error or (ended.trace and ended.trace.error)}") from ended.error
    return ended.trace


def _samples(group: list[tuple[Trace, float]]) -> list[Sample]:
    """Every trainable trace of an episode carries the episode's advantage."""
    advantages = group_advantages([reward for _, reward in group])
    return [
        Sample(TokenSequence(list(t.tokens), list(t.media), list(t.loss_mask)), t.logprobs, advantage)
        for (trace, _), advantage in zip(group, advantages, strict=True)
        for t in _tree(trace)
        if t.trainable and sum(t.loss_mask)
    ]


def _tree(trace: Trace) -> list[Trace]:
    return [trace, *(t for child in trace.children for t in _tree(child))]
