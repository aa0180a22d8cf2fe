"""Wide search on held-out worlds and on the installed packages, by agents without a flaw."""

import pytest

from baltoro.agent.scripted import Script, ScriptedEngine
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.eval.wide import Job, evaluate_wide, held_out_jobs, package_jobs
from baltoro.swarm.wide import WideRules
from baltoro.world.corpora import FIELDS, installed_packages
from baltoro.world.names import split_of

RULES = WideRules(max_context_tokens=200_000, max_turn_tokens=20_000, subagent_turn_tokens=2000)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return held_out_jobs(4, 4, 6, seed=1)


def test_held_out_jobs(jobs: list[Job]) -> None:
    assert len(jobs) == 4
    for job in jobs:
        assert 4 <= len(job.task.names) <= 6
        assert all(split_of(page.title) == "heldout" for page in job.library.pages.values())
        pages = {page.title: page.text.split("\n") for page in job.library.pages.values()}
        for name, cells in job.task.gold.items():
            assert all(f"|{column}={value}" in pages[name] for column, value in cells.items())


def test_every_job_has_a_world_of_its_own_that_follows_from_the_seed(jobs: list[Job]) -> None:
    worlds = [frozenset(page.text for page in job.library.pages.values()) for job in jobs]
    assert all(not a & b for i, a in enumerate(worlds) for b in worlds[:i])
    again, other = held_out_jobs(2, 4, 6, seed=1), held_out_jobs(1, 4, 6, seed=2)
    assert [job.task for job in again] == [job.task for job in jobs[:2]]  # more jobs do not change the first
    assert other[0].task != jobs[0].task


async def test_a_perfect_swarm(
    jobs: list[Job], tokenizer: Tokenizer, media_spec: MediaSpec, swarm_script: Script
) -> None:
    engine = ScriptedEngine(tokenizer, swarm_script)
    result = await evaluate_wide(
        engine, tokenizer, media_spec, jobs, mode="swarm", role="orchestrator", budget=6, rules=RULES, seed=0
    )
    rows = sum(len(job.task.names) for job in jobs)
    assert result.item_f1 == 1
    assert result.critical_steps == 1 + (1 + 3) + 1
    assert result.total_steps == 3 + 3 * rows / 4
    assert result.parallelism == rows / 4
    assert result.summary() == {"item_f1": 1, "critical_steps": 6, "total_steps": 3 + 3 * rows / 4, "n": 4}
    for job, trace in zip(jobs, result.traces, strict=True):
        assert tuple(child.messages[1].text.split("|")[0] for child in trace.children) == job.task.names


async def test_a_perfect_single_agent_within_a_budget(
    jobs: list[Job], tokenizer: Tokenizer, media_spec: MediaSpec, swarm_script: Script
) -> None:
    engine = ScriptedEngine(tokenizer, swarm_script)
    for budget in (7, None):
        result = await evaluate_wide(
            engine, tokenizer, media_spec, jobs, mode="single", role="agent", budget=budget, rules=RULES, seed=0
        )
        sizes = [len(job.task.names) for job in jobs]
        # Under 7 steps: 3 of n rows, F1 = 2 * 3 / (3 + n).
        expected = 1 if budget is None else sum(2 * 3 / (3 + n) for n in sizes) / 4
        steps = sum(2 * n + 1 for n in sizes) / 4 if budget is None else 7
        assert result.item_f1 == pytest.approx(expected)
        assert result.critical_steps == result.total_steps == steps
        assert result.parallelism == 0


async def test_each_job_and_seed_draws_for_itself(jobs: list[Job], tokenizer: Tokenizer, media_spec: MediaSpec) -> None:
    engine = ScriptedEngine(tokenizer, lambda prompt, role: "</think>no")
    for seed in (0, 1):
        await evaluate_wide(
            engine, tokenizer, media_spec, jobs, mode="single", role="agent", budget=3, rules=RULES, seed=seed
        )
    assert len({sampling.seed for sampling in engine.samplings}) == 8
    assert {sampling.temperature for sampling in engine.samplings} == {0}


def test_package_jobs_ask_for_real_metadata() -> None:
    records = {record.name: record for record in installed_packages()}
    jobs = package_jobs(8)
    assert len(jobs) == len(records) // 8
    names = [name for job in jobs for name in job.task.names]
    assert len(set(names)) == len(names) == 8 * len(jobs)
    for job in jobs:
        assert job.task.columns == FIELDS
        assert job.task.gold == {name: records[name].values for name in job.task.names}
        assert {page.title for page in job.library.pages.values()} == set(records)
        for name in job.task.names:
            assert all(f"|{field}={records[name].values[field]}" in records[name].document.text for field in FIELDS)


async def test_a_perfect_swarm_finds_real_metadata(
    tokenizer: Tokenizer, media_spec: MediaSpec, swarm_script: Script
) -> None:
    """Every package's page is among the hits for its name."""
    engine = ScriptedEngine(tokenizer, swarm_script)
    result = await evaluate_wide(
        engine,
        tokenizer,
        media_spec,
        package_jobs(8),
        mode="swarm",
        role="orchestrator",
        budget=6,
        rules=RULES,
        seed=0,
    )
    assert result.item_f1 == 1
    assert result.critical_steps == 6
