"""Wide search, single agent against swarm: on held-out worlds and on the metadata of the installed packages."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.swarm.critical import critical_steps, parallelism, total_steps
from baltoro.swarm.wide import Library, Mode, WideRules, solve
from baltoro.world.corpora import FIELDS, installed_packages
from baltoro.world.entities import World
from baltoro.world.tasks import WideSearch, wide_search


@dataclass(frozen=True, eq=False)
class Job:
    task: WideSearch
    library: Library


@dataclass(frozen=True, eq=False)
class WideResult:
    """Means over tasks. traces stand in the order of the jobs."""

    item_f1: float
    critical_steps: float
    total_steps: float
    parallelism: float
    traces: list[Trace]

    def summary(self) -> dict[str, float]:
        return {
            "item_f1": self.item_f1,
            "critical_steps": self.critical_steps,
            "total_steps": self.total_steps,
            "n": len(self.traces),
        }


def held_out_jobs(n: int, low: int, high: int, seed: int) -> list[Job]:
    """Each on a held-out world of its own, N entities in [low, high]."""
    jobs: list[Job] = []
    for i in range(n):
        rng = random.Random(f"wide {seed} {i}")
        world = World(rng.randrange(2**31), "heldout")
        jobs.append(Job(wide_search(rng, world, low, high), Library(world.documents)))
    return jobs


def package_jobs(per_task: int) -> list[Job]:
    """All installed packages with complete metadata, `per_task` to a table of FIELDS; one library of all of them."""
    records = installed_packages()
    library = Library([record.document for record in records])
    chunks = [records[i : i + per_task] for i in range(0, len(records) - per_task + 1, per_task)]
    return [
        Job(WideSearch(tuple(r.name for r in chunk), FIELDS, {r.name: r.values for r in chunk}), library)
        for chunk in chunks
    ]


async def evaluate_wide(
    engine: Engine,
    tokenizer: Tokenizer,
    media: MediaSpec,
    jobs: Sequence[Job],
    *,
    mode: Mode,
    role: str,
    budget: int | None,
    rules: WideRules,
    seed: int,
    temperature: float = 0.0,
) -> WideResult:
    """Every job once under `budget` critical steps."""
    traces = await asyncio.gather(
        *(
            solve(
                engine,
                tokenizer,
                media,
                job.task,
                job.library,
                mode=mode,
                critical_steps=budget,
                sampling=Sampling(rules.max_turn_tokens, temperature, seed=seed * 100_003 + i),
                rules=rules,
                role=role,
            )
            for i, job in enumerate(jobs)
        )
    )
    n = len(traces)
    return WideResult(
        sum(t.signals["perf"] for t in traces) / n,
        sum(map(critical_steps, traces)) / n,
        sum(map(total_steps, traces)) / n,
        sum(map(parallelism, traces)) / n,
        list(traces),
    )
