"""Reinforcement learning of one policy: rollouts by group, advantages against the group's mean, one Eq. 1 update.

Nothing here knows what the episodes are: a rollout is a coroutine that ends in a trace, a reward reads the trace's
signals. PARL is this loop with an orchestrator's traces and `ParlShaping`.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from baltoro.agent.engine import Engine
from baltoro.agent.loop import derive_seed
from baltoro.agent.trace import Trace, spread
from baltoro.chat.messages import TokenSequence
from baltoro.model.kimi import KimiK25
from baltoro.rl.objective import ObjectiveConfig, group_advantages
from baltoro.rl.update import Sample, UpdateReport, update
from baltoro.rollout.journal import Journal
from baltoro.rollout.manager import Ended, ManagerConfig, RolloutManager, Running
from baltoro.rollout.partial import resumable
from baltoro.serve.local import LocalEngine
from baltoro.train.machine import trim_memory
from baltoro.train.stage import optimizer_for
from baltoro.train.state import Progress, load_state, save_state

Rollout = Callable[[Engine, int, int], Awaitable[Trace]]
"""(engine, task seed, episode seed) -> the finished episode: the task follows from the first, the draw from both."""


@dataclass(frozen=True)
class RLConfig:
    """iterations of `tasks` groups of `rollouts` episodes (K of Eq. 1). ahead: groups that are begun beside them. An
    iteration ends with the first `tasks` groups that are whole; the others are cut and go on in the next, under newer
    weights (partial rollout, appendix D)."""

    iterations: int
    tasks: int
    rollouts: int
    lr: float
    objective: ObjectiveConfig
    trains: tuple[str, ...] = ("language_model", "vision_tower", "mm_projector")
    weight_decay: float = 0.0
    micro_tokens: int = 8192
    ahead: int = 0


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
    rollout: Rollout,
    reward: Callable[[Trace, int], float],
    seed: int,
    checkpoint: Path,
    report: Callable[[IterationReport], None],
) -> Progress:
    """Train `model` in place; `engine` serves it under `policy_role` and whatever is frozen under other roles.

    An iteration is a pure function of weights, seed and its number, so a run resumes exactly at the last finished one.
    With groups ahead it also depends on which groups were whole first. What was begun is kept beside the checkpoint,
    and a resumed run goes on from there.
    """
    optimizer = optimizer_for(model, config.trains, config.weight_decay)
    progress = Progress(name, 0, 0.0, 0)
    journal = checkpoint.with_suffix(".journal")
    if checkpoint.exists():
        progress = load_state(checkpoint, model, optimizer)
    else:
        for stale in checkpoint.parent.glob(f"{journal.name}*"):
            stale.unlink()
    begin = time.monotonic() - progress.seconds
    tokens = progress.tokens
    for iteration in range(progress.step, config.iterations):
        engine.weight_version = iteration
        engine.update(policy_role, model)
        traces = asyncio.run(_roll_out(engine, config, rollout, seed, iteration, journal))
        groups = [[(trace, reward(trace, iteration)) for trace in group] for group in traces]
        samples = [s for group in groups for s in _samples(group, engine.weight_version)]
        result = update(model, optimizer, samples, config.lr, config.objective, config.micro_tokens)
        tokens += sum(len(s.sequence.ids) for s in samples)
        progress = Progress(name, iteration + 1, time.monotonic() - begin, tokens)
        # Reported first: what is reported behind the checkpoint is dropped on resume, what is missing stays missing.
        report(IterationReport(iteration + 1, groups, result, tokens, progress.seconds))
        save_state(checkpoint, model, optimizer, progress)
        trim_memory()
    return progress


async def _roll_out(
    engine: LocalEngine, config: RLConfig, rollout: Rollout, seed: int, iteration: int, path: Path
) -> list[list[Trace]]:
    """Groups have numbers through all iterations, episodes the names of their group and place. Those that an iteration
    trains on are claimed for it."""
    manager = RolloutManager(engine, ManagerConfig())
    async with Journal.open(path) as journal, engine.run():
        journal.forget(iteration)
        claimed = {_group(episode) for episode, step in journal.claims.items() if step == iteration}
        used = {_group(episode) for episode in journal.claims}
        free = (number for number in itertools.count() if number not in used)
        begun = sorted(claimed) or list(itertools.islice(free, config.tasks + config.ahead))
        async with manager.run():
            running: dict[int, list[Running]] = {}
            for number in begun:
                task = derive_seed(derive_seed(seed, number // config.tasks), number % config.tasks)
                running[number] = [
                    await manager.submit(f"{number}/{k}", resumable(journal, _episode(rollout, task, k)))
                    for k in range(config.rollouts)
                ]
            whole = await _whole(running, config.tasks)
            await manager.cut()
        if not claimed:
            await journal.claim(iteration, [each.episode for number in whole for each in whole[number]])
    return [[_trace(each) for each in whole[number]] for number in sorted(whole)]


def _episode(rollout: Rollout, task: int, k: int) -> Callable[[Engine], Awaitable[Trace]]:
    return lambda engine: rollout(engine, task, derive_seed(task, k))


def _group(episode: str) -> int:
    return int(episode.partition("/")[0])


async def _whole(running: dict[int, list[Running]], wanted: int) -> dict[int, list[Ended]]:
    """The first groups whose episodes have all ended."""

    async def ended(number: int) -> tuple[int, list[Ended]]:
        return number, [await episode.ended() for episode in running[number]]

    whole: dict[int, list[Ended]] = {}
    async with asyncio.TaskGroup() as group:
        waits = [group.create_task(ended(number)) for number in running]
        for wait in asyncio.as_completed(waits):
            number, episodes = await wait
            whole[number] = episodes
            if len(whole) == wanted:
                break
        for wait in waits:
            wait.cancel()
    return whole


def _trace(ended: Ended) -> Trace:
    if ended.trace is None or ended.outcome == "failed":  # the engine is ours: its failure is no property of the policy
        raise RuntimeError(f"a rollout failed: {ended.error or (ended.trace and ended.trace.error)}") from ended.error
    return ended.trace


def _samples(group: list[tuple[Trace, float]], version: int) -> list[Sample]:
    """Every trainable trace of an episode carries the episode's advantage."""
    advantages = group_advantages([reward for _, reward in group])
    return [
        Sample(
            TokenSequence(list(t.tokens), list(t.media), list(t.loss_mask)),
            t.logprobs,
            advantage,
            spread(t.turns, len(t.tokens), lambda turn: [version - turn.weight_version] * len(turn.ids), 0),
        )
        for (trace, _), advantage in zip(group, advantages, strict=True)
        for t in _tree(trace)
        if t.trainable and sum(t.loss_mask)
    ]


def _tree(trace: Trace) -> list[Trace]:
    return [trace, *(t for child in trace.children for t in _tree(child))]
