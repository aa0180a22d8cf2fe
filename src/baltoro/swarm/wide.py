"""Wide search as an environment, solved by a single agent or by a swarm under the same budget of critical steps."""

import functools
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.loop import Limits
from baltoro.agent.tool import Tool
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.env import Agent, Env, World, alone
from baltoro.rollout.judge import Judge, Policy, Reward, Task
from baltoro.score.table import item_f1, parse_table
from baltoro.swarm.demonstrations import HITS, NOTICE, SINGLE_PROMPT, SWARM_PROMPT
from baltoro.swarm.episode import run_swarm
from baltoro.tools.reader import Reader
from baltoro.tools.search import Search, SearchIndex
from baltoro.world import entities
from baltoro.world.document import Document
from baltoro.world.scenes import Split
from baltoro.world.tasks import WideSearch, wide_search

Mode = Literal["single", "swarm"]


@dataclass(frozen=True)
class WideRules:
    """Bounds of the agents. E.8 allows 100 / 100 steps; a context here must also fit the engine."""

    max_context_tokens: int
    max_turn_tokens: int
    subagent_turns: int = 8
    subagent_turn_tokens: int = 96
    max_turns: int = 100


class Library:
    """Pages with the tools to find and read them."""

    def __init__(self, documents: list[Document]):
        self.pages: Mapping[str, Document] = {document.url: document for document in documents}
        self.index = SearchIndex.build(documents)
        self.tools: list[Tool] = [Search(self.index, HITS), Reader(self.pages)]


@functools.lru_cache(maxsize=32)
def _library(world: int, split: Split) -> Library:
    return Library(entities.World(world, split).documents)


def world_library(task: Task) -> Library:
    """Of the world that the task was drawn from."""
    return _library(task["world"], task["split"])


def row_of(task: WideSearch, **source: object) -> Task:
    """source: where its library comes from."""
    return {"names": list(task.names), "columns": list(task.columns), "gold": task.gold, **source}


def wide_env(
    mode: Mode,
    critical_steps: int | None,
    rules: WideRules,
    rows: tuple[int, int],
    library: Callable[[Task], Library] = world_library,
) -> Env:
    """Tasks of training worlds with `rows` rows; signal `perf`, the item-F1 of the answer. A failure scores what its
    text is worth: nothing."""

    def sample(seed: int) -> Task:
        rng = random.Random(seed)
        world = rng.randrange(2**31)
        return row_of(wide_search(rng, entities.World(world, "train"), *rows), world=world, split="train")

    @asynccontextmanager
    async def open_library(task: Task, seed: int) -> AsyncGenerator[World]:
        prompt = WideSearch(tuple(task["names"]), tuple(task["columns"]), task["gold"]).prompt
        yield World((prompt,), library(task).tools, SINGLE_PROMPT if mode == "single" else SWARM_PROMPT)

    limits = Limits(
        max_turns=rules.max_turns,
        max_context_tokens=rules.max_context_tokens,
        max_turn_tokens=rules.max_turn_tokens,
        critical_steps=critical_steps,
        notice=NOTICE,
    )
    agent = alone if mode == "single" else _swarm(rules)
    return Env(f"wide-{mode}", "1", sample, open_library, Judge(Reward("perf", _perf)), limits, agent)


def _perf(task: Task, trace: Trace) -> float:
    return item_f1(parse_table(trace.final_text, task["columns"]), task["gold"])


def _swarm(rules: WideRules) -> Agent:
    async def swarm(engine: Engine, policy: Policy, world: World, limits: Limits) -> Trace:
        return await run_swarm(
            engine,
            policy.tokenizer,
            policy.media_spec,
            task_prompt=world.prompt,
            system_prompt=world.system,
            orchestrator_tools=world.tools,
            subagent_tools=world.tools,
            orchestrator_limits=limits,
            subagent_limits=Limits(
                max_turns=rules.subagent_turns,
                max_context_tokens=rules.max_context_tokens,
                max_turn_tokens=rules.subagent_turn_tokens,
                notice=NOTICE,
            ),
            sampling=policy.sampling,
            # Frozen subagents are part of the environment: only the orchestrator explores.
            subagent_sampling=replace(policy.sampling, temperature=0.0),
            declare_tools=policy.declare_tools,
            trainable=policy.trainable,
            thinking=policy.thinking,
        )

    return swarm


async def solve(
    engine: Engine,
    tokenizer: Tokenizer,
    media: MediaSpec,
    task: WideSearch,
    library: Library,
    *,
    mode: Mode,
    critical_steps: int | None,
    sampling: Sampling,
    rules: WideRules,
    role: str,
) -> Trace:
    """One episode of one task with a library of its own."""
    env = wide_env(mode, critical_steps, rules, (1, 1), lambda _: library)
    policy = Policy(tokenizer, media, sampling, role, declare_tools=False)
    return await env.rollout(engine, policy, row_of(task), sampling.seed)
