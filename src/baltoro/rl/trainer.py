"""Reinforcement learning of one policy: rollouts by group, advantages against the group's mean, one Eq. 1 update.

Nothing here knows what the episodes are: an environment ends in a trace with named signals, and weights make one reward
of them. PARL is this loop with an orchestrator's traces and the weights of `ParlShaping`.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from baltoro.agent.engine import Engine
from baltoro.agent.loop import derive_seed
from baltoro.agent.trace import Trace, spread
from baltoro.chat.messages import TokenSequence
from baltoro.model.kimi import KimiK25
from baltoro.optim.schedule import wsd
from baltoro.rl.objective import ObjectiveConfig, group_advantages
from baltoro.rl.update import Sample, UpdateReport, update
from baltoro.rollout.env import Env
from baltoro.rollout.journal import Journal
from baltoro.rollout.judge import Policy, Task, total
from baltoro.rollout.manager import Ended, ManagerConfig, RolloutManager, Running
from baltoro.rollout.partial import resumable
from baltoro.rollout.record import Record, agents
from baltoro.serve.local import LocalEngine
from baltoro.train.machine import trim_memory
from baltoro.train.stage import optimizer_for
from baltoro.train.state import Progress, load_state, save_state

Tasks = Callable[[int], tuple[Env, Task]]
"""Task seed to an environment and a task of it."""

Opened = Callable[[], AbstractAsyncContextManager[Tasks]]
"""Opens what the tasks of one iteration need beside the running engine."""

Weights = Callable[[int], Mapping[str, float]]
"""Iteration to the weights of the signals."""


@dataclass(frozen=True)
class RLConfig:
    """iterations of `tasks` groups of `rollouts` episodes (K of Eq. 1). ahead: groups that are begun beside them. An
    iteration ends with the first `tasks` groups that are whole; the others are cut and go on in the next, under newer
    weights (partial rollout, appendix D). The learning rate falls from `lr` to its share `lr_floor`."""

    iterations: int
    tasks: int
    rollouts: int
    lr: float
    objective: ObjectiveConfig
    trains: tuple[str, ...] = ("language_model", "vision_tower", "mm_projector")
    lr_floor: float = 1.0
    weight_decay: float = 0.0
    micro_tokens: int = 8192
    ahead: int = 0


@dataclass(frozen=True, eq=False)
class Group:
    """The K episodes of one task, with their seeds."""

    env: Env
    task: Task
    seeds: list[int]
    traces: list[Trace]


@dataclass(frozen=True, eq=False)
class IterationReport:
    """groups: of every task, in order; weights: of the signals in this iteration."""

    iteration: int
    groups: list[Group]
    weights: Mapping[str, float]
    update: UpdateReport
    tokens: int
    seconds: float

    @property
    def traces(self) -> list[Trace]:
        return [trace for group in self.groups for trace in group.traces]

    def mean_of(self, signal: str, env: str) -> float:
        """Over the episodes of an environment that have the signal."""
        traces = [trace for group in self.groups if group.env.name == env for trace in group.traces]
        values = [trace.signals[signal] for trace in traces if signal in trace.signals]
        return sum(values) / len(values) if values else 0.0

    def mean(self, value: Callable[[Trace], float]) -> float:
        return sum(map(value, self.traces)) / len(self.traces)

    @property
    def reward(self) -> float:
        """Over the episodes that have one."""
        rewards = [r for trace in self.traces if (r := total(self.weights, trace.signals)) is not None]
        return sum(rewards) / len(rewards) if rewards else 0.0

    @property
    def records(self) -> list[Record]:
        """As they were trained on."""
        recomputed = iter(self.update.policy_logprobs)
        return [
            Record(
                group.env.name,
                group.env.version,
                group.task,
                f"{self.iteration}/{number}",
                seed,
                trace,
                dict(self.weights),
                reward,
                advantage,
                tuple(_aligned(t, next(recomputed)) if _trained(t, advantage) else () for _, t in agents(trace)),
            )
            for number, group in enumerate(self.groups)
            for seed, (trace, reward, advantage) in zip(group.seeds, _judged(group, self.weights), strict=True)
        ]


def run_rl(
    name: str,
    model: KimiK25,
    engine: LocalEngine,
    config: RLConfig,
    opened: Opened,
    policy: Policy,
    weights: Weights,
    seed: int,
    checkpoint: Path,
    report: Callable[[IterationReport], None],
) -> Progress:
    """Train `model` in place; `engine` serves it under the role of `policy`, and whatever is frozen under other roles.

    An iteration is a pure function of weights, seed and its number, so a run resumes exactly: an iteration whose
    episodes had not all ended is begun again, because the rest of them would run in smaller batches, whose sums round
    differently. With groups ahead an iteration also depends on which groups were whole first; then what was begun is
    kept beside the checkpoint, and a resumed run goes on from there.
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
        engine.update(policy.role, model)
        groups = asyncio.run(_roll_out(engine, config, opened, policy, seed, iteration, journal))
        signs = weights(iteration)
        samples = [sample for group in groups for sample in _samples(group, signs, engine.weight_version)]
        lr = config.lr * wsd(iteration, config.iterations, 0, config.iterations, config.lr_floor)
        result = update(model, optimizer, samples, lr, config.objective, config.micro_tokens)
        tokens += sum(len(s.sequence.ids) for s in samples)
        progress = Progress(name, iteration + 1, time.monotonic() - begin, tokens)
        # Reported first: what is reported behind the checkpoint is dropped on resume, what is missing stays missing.
        report(IterationReport(iteration + 1, groups, signs, result, tokens, progress.seconds))
        save_state(checkpoint, model, optimizer, progress)
        trim_memory()
    return progress


async def _roll_out(
    engine: LocalEngine, config: RLConfig, opened: Opened, policy: Policy, seed: int, iteration: int, path: Path
) -> list[Group]:
    """Groups have numbers through all iterations, episodes the names of their group and place. Those that an iteration
    trains on are claimed for it."""
    manager = RolloutManager(engine, ManagerConfig())
    async with Journal.open(path) as journal, engine.run(), opened() as tasks:
        journal.forget(iteration)
        if not config.ahead:
            journal.forget_unclaimed()
        claimed = {_group(episode) for episode, step in journal.claims.items() if step == iteration}
        used = {_group(episode) for episode in journal.claims}
        free = (number for number in itertools.count() if number not in used)
        begun = sorted(claimed) or list(itertools.islice(free, config.tasks + config.ahead))
        groups: dict[int, Group] = {}
        running: dict[int, list[Running]] = {}
        async with manager.run():
            for number in begun:
                task_seed = derive_seed(derive_seed(seed, number // config.tasks), number % config.tasks)
                group = Group(*tasks(task_seed), [derive_seed(task_seed, k) for k in range(config.rollouts)], [])
                groups[number] = group
                running[number] = [
                    await manager.submit(f"{number}/{k}", resumable(journal, _episode(group, policy, each)))
                    for k, each in enumerate(group.seeds)
                ]
            whole = await _whole(running, config.tasks)
            await manager.cut()
        if not claimed:
            await journal.claim(iteration, [each.episode for number in whole for each in whole[number]])
    for number, ended in whole.items():
        groups[number].traces.extend(map(_trace, ended))
    return [groups[number] for number in sorted(whole)]


def _episode(group: Group, policy: Policy, seed: int) -> Callable[[Engine], Awaitable[Trace]]:
    return lambda engine: group.env.rollout(engine, policy, group.task, seed)


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


def _judged(group: Group, weights: Mapping[str, float]) -> list[tuple[Trace, float | None, float | None]]:
    """Each trace with its reward and its advantage; None for both where a judge failed."""
    rewards = [total(weights, trace.signals) for trace in group.traces]
    known = [reward for reward in rewards if reward is not None]
    advantages = iter(group_advantages(known) if known else [])
    return [
        (trace, reward, None if reward is None else next(advantages))
        for trace, reward in zip(group.traces, rewards, strict=True)
    ]


def _samples(group: Group, weights: Mapping[str, float], version: int) -> list[Sample]:
    """Every trainable trace of an episode carries the episode's advantage. version: of the weights that are trained."""
    return [
        Sample(
            TokenSequence(list(t.tokens), list(t.media), list(t.loss_mask)),
            t.logprobs,
            advantage,
            spread(t.turns, len(t.tokens), lambda turn: [version - turn.weight_version] * len(turn.ids), 0),
        )
        for trace, _, advantage in _judged(group, weights)
        if advantage is not None
        for _, t in agents(trace)
        if _trained(t, advantage)
    ]


def _trained(trace: Trace, advantage: float | None) -> bool:
    return trace.trainable and advantage is not None and any(trace.loss_mask)


def _aligned(trace: Trace, logprobs: list[float]) -> tuple[float, ...]:
    """Of the marked tokens, put where they stand; 0 elsewhere."""
    left = iter(logprobs)
    return tuple(next(left) if mask else 0.0 for mask in trace.loss_mask)
