"""What episodes came to: each value by its mean over tasks, with the standard error of that mean."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from baltoro.rollout.record import Record, agents


@dataclass(frozen=True)
class Estimate:
    """mean: over `tasks` of the mean of each one's episodes. error: its standard error, from the spread between tasks
    alone, since episodes of one task are alike; nan for a single task."""

    mean: float
    error: float
    tasks: int


def estimate(groups: Iterable[Sequence[float]]) -> Estimate | None:
    """Of the values of each task; tasks without any do not count, None where none has."""
    means = [statistics.fmean(values) for values in groups if values]
    if not means:
        return None
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Estimate(statistics.fmean(means), error, len(means))


def summary(records: Sequence[Record], rollouts: int) -> dict[str, Estimate]:
    """By name: reward, best of `rollouts` (tasks of which so many episodes have a reward), every signal; and per
    episode, all its agents together, model calls, tokens drawn and seconds."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)

    def over(value: Callable[[Record], float | None]) -> Estimate | None:
        return estimate([v for record in group if (v := value(record)) is not None] for group in groups.values())

    rewards = [[r.reward for r in group if r.reward is not None] for group in groups.values()]
    names = dict.fromkeys(name for record in records for name in record.trace.signals)
    found = {
        "reward": estimate(rewards),
        f"best of {rollouts}": estimate([max(each)] for each in rewards if len(each) == rollouts),
        **{name: over(lambda record, name=name: record.trace.signals.get(name)) for name in names},
        "turns": over(lambda record: sum(len(agent.turns) for _, agent in agents(record.trace))),
        "tokens drawn": over(
            lambda record: sum(len(turn.ids) for _, agent in agents(record.trace) for turn in agent.turns)
        ),
        "seconds": over(lambda record: record.trace.turns[-1].ended if record.trace.turns else 0.0),
    }
    return {name: value for name, value in found.items() if value is not None}


def lines(records: Sequence[Record], rollouts: int, faults: Counter[str]) -> list[str]:
    """For a person to read. faults: why other episodes are missing."""
    outcomes = Counter(record.trace.status for record in records)
    ended = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    unjudged = sum(record.reward is None for record in records)
    rows = summary(records, rollouts)
    width = max(map(len, rows), default=0)
    return [
        f"{len(records)} episodes{': ' * bool(ended)}{ended}",
        *([f"{unjudged} of them have no reward: a judge failed"] if unjudged else []),
        *([f"{'':{width}} {'mean':>10} {'error':>10} {'tasks':>6}"] if rows else []),
        *(f"{name:{width}} {row.mean:10.4g} {row.error:10.2g} {row.tasks:6}" for name, row in rows.items()),
        *(f"{count} more are missing, {' '.join(fault.split())}" for fault, count in faults.most_common()),
        *(["the same command runs those again"] if faults else []),
    ]
