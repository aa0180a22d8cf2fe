"""Reinforcement learning whole: a real model, the real engine, a task that can be learned in a few iterations."""

import contextlib
import dataclasses
import shutil
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baltoro.agent.engine import Completion, Engine, Sampling
from baltoro.agent.loop import Limits, derive_seed
from baltoro.agent.trace import Trace, Turn, spread
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence, assistant
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.config import NANO
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25
from baltoro.rl.objective import ObjectiveConfig
from baltoro.rl.trainer import IterationReport, RLConfig, run_rl
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Policy, Reward, Task
from baltoro.serve.local import LocalEngine

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})


def _model() -> KimiK25:
    text = dataclasses.replace(
        NANO.text, vocab_size=TOKENIZER.vocab_size, hidden_size=32, num_layers=2, num_heads=4, initializer_range=0.1
    )
    model = KimiK25(dataclasses.replace(NANO, text=text), TOKENIZER.media_pad)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def _trace(role: str, prompt: list[int], done: Completion, trainable: bool, *children: Trace) -> Trace:
    turn = Turn(
        len(prompt), tuple(done.ids), tuple(done.logprobs), done.weight_version, assistant(), (), children, 0, 0, 0
    )
    return Trace(
        role=role,
        messages=(),
        tokens=(*prompt, *done.ids),
        loss_mask=(*[0] * len(prompt), *[1] * len(done.ids)),
        logprobs=(*[0.0] * len(prompt), *done.logprobs),
        media=(),
        turns=(turn,),
        status="completed",
        final_text="",
        trainable=trainable,
    )


async def _agent(engine: Engine, policy: Policy, world: World, limits: Limits) -> Trace:
    """Four tokens after one of three prompts, and a frozen child, whose tokens the policy could not have sampled."""
    prompt = [int(world.system), 7]
    done = await engine.generate(TokenSequence(prompt), replace(policy.sampling, max_tokens=4), policy.role)
    child = _trace("child", [9, 9], Completion([200, 201, 202], [-0.001] * 3, "length", 0), False)
    return _trace("policy", prompt, done, True, child)


@asynccontextmanager
async def _open(task: Task, seed: int) -> AsyncGenerator[World]:
    yield World((), system=str(task["prompt"]))


def _low(task: Task, trace: Trace) -> float:
    sampled = trace.tokens[2:]
    return sum(token < 160 for token in sampled) / len(sampled)


def _env(judge: Judge) -> Env:
    return Env("low", "1", lambda seed: {"prompt": seed % 3}, _open, judge, Limits(1, 16, 4), _agent)


ENV = _env(Judge(Reward("low", _low)))
POLICY = Policy(TOKENIZER, MediaSpec.K25, Sampling(4), "policy")


def _run(
    folder: Path,
    model: KimiK25,
    iterations: int,
    env: Env = ENV,
    report: Callable[[IterationReport], None] = lambda _: None,
) -> list[IterationReport]:
    reports: list[IterationReport] = []

    def reported(done: IterationReport) -> None:
        reports.append(done)
        report(done)

    config = RLConfig(iterations, tasks=3, rollouts=8, lr=4e-2, objective=ObjectiveConfig())
    engine = LocalEngine({"policy": model}, TOKENIZER, slots=32, max_len=16)
    checkpoint = folder / "rl.safetensors"
    run_rl(
        "rl",
        model,
        engine,
        config,
        lambda: nullcontext(lambda seed: (env, env.sample(seed))),
        POLICY,
        lambda _: env.judge.weights,
        5,
        checkpoint,
        reported,
    )
    return reports


def test_reward_rises_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    straight = _model()
    reports = _run(whole, straight, 12)
    assert reports[0].reward < 0.65  # half of the vocabulary is rewarded
    assert reports[-1].reward > 0.85
    # The trainer scores what the engine sampled with the same weights: before the update both agree.
    assert all(report.update.mismatch < 1e-4 for report in reports)
    first = _run(halves, _model(), 4)
    resumed = _model()
    second = _run(halves, resumed, 12)
    assert [r.iteration for r in second] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert [r.reward for r in first + second] == [r.reward for r in reports]
    wanted = straight.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.state_dict().items())


def test_an_iteration_that_was_killed_is_begun_again(tmp_path: Path) -> None:
    """What a kill may leave of the second iteration: the records of some of its episodes, and no claims. If these were
    replayed, the others would be drawn in smaller batches, and differ in the last bits."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    straight = _model()

    def report(done: IterationReport) -> None:
        if done.iteration == 2:  # on the disk are the first one's weights and the second one's episodes
            shutil.copytree(whole, killed)

    _run(whole, straight, 3, report=report)
    with contextlib.closing(sqlite3.connect(killed / "rl.journal")) as db:
        db.execute("DELETE FROM claims WHERE step = 1")
        db.execute("DELETE FROM records WHERE episode LIKE '%/0' OR episode LIKE '4/%'")
        db.commit()
        assert db.execute("SELECT count(DISTINCT episode) FROM records").fetchone()[0] >= 14
    resumed = _model()
    assert [each.iteration for each in _run(killed, resumed, 3)] == [2, 3]
    wanted = straight.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.state_dict().items())


def test_episodes_whose_judge_failed_are_no_samples(tmp_path: Path) -> None:
    """The judge fails for every second episode; what is recorded is what was trained on."""

    def fails(task: Task, trace: Trace) -> float:
        if trace.tokens[2] % 2:
            raise KeyError("gold")
        return _low(task, trace)

    (report,) = _run(tmp_path, _model(), 1, _env(Judge(Reward("low", fails))))
    odd = [record for record in report.records if record.trace.tokens[2] % 2]
    even = [record for record in report.records if not record.trace.tokens[2] % 2]
    assert len(report.records) == 24
    assert odd
    assert even
    assert all(record.reward is record.advantage is None for record in odd)
    assert all(record.policy_logprobs == ((), ()) for record in odd)  # the child is never trained
    for record in even:
        policy, child = record.policy_logprobs
        assert policy == pytest.approx(record.trace.logprobs, abs=1e-4)
        assert child == ()
    assert report.update.tokens == 4 * len(even)
    for group in {record.group for record in even}:
        members = [record for record in even if record.group == group]
        mean = sum(record.reward or 0.0 for record in members) / len(members)
        assert [record.advantage for record in members] == [(record.reward or 0.0) - mean for record in members]


def test_groups_ahead_are_cut_and_go_on_under_newer_weights(tmp_path: Path) -> None:
    """Every third task takes many turns. All are trained on, once, whole, in whatever iteration; a run that stops and
    is taken up in between goes on with what it had begun."""

    async def agent(engine: Engine, policy: Policy, world: World, limits: Limits) -> Trace:
        task = int(world.system)
        ids = [task % 100, 7]
        turns: list[Turn] = []
        for turn in range(8 if task % 3 == 0 else 1):
            sampling = Sampling(4, seed=derive_seed(policy.sampling.seed, turn))
            done = await engine.generate(TokenSequence(list(ids)), sampling, "policy")
            turns += _trace("policy", ids, done, True).turns
            ids += done.ids
        whole = _trace("policy", ids[:2], Completion(ids[2:], [0.0] * len(ids[2:]), "stop", 0), True)
        mask = spread(turns, len(ids), lambda turn: [1] * len(turn.ids), 0)
        logprobs = spread(turns, len(ids), lambda turn: turn.logprobs, 0.0)
        return replace(whole, turns=tuple(turns), loss_mask=mask, logprobs=logprobs)

    env = Env("ahead", "1", lambda seed: {"prompt": seed}, _open, ENV.judge, Limits(8, 64, 4), agent)

    def run(iterations: int) -> None:
        config = RLConfig(iterations, tasks=2, rollouts=3, lr=1e-2, objective=ObjectiveConfig(), ahead=2)
        model = _model()
        run_rl(
            "rl",
            model,
            LocalEngine({"policy": model}, TOKENIZER, slots=32, max_len=64),
            config,
            lambda: nullcontext(lambda seed: (env, env.sample(seed))),
            POLICY,
            lambda _: env.judge.weights,
            5,
            tmp_path / "rl.safetensors",
            reports.append,
        )

    reports: list[IterationReport] = []
    run(3)
    run(6)
    assert [report.iteration for report in reports] == [1, 2, 3, 4, 5, 6]
    groups = [group for report in reports for group in report.groups]
    assert len({group.task["prompt"] for group in groups}) == len(groups) == 12
    traces = [trace for group in groups for trace in group.traces]
    assert len(traces) == 36
    assert {len(trace.turns) for trace in traces} == {1, 8}
    versions = [[turn.weight_version for turn in trace.turns] for trace in traces]
    assert all(each == sorted(each) for each in versions)
    assert any(len(set(each)) > 1 for each in versions)
    ages = [report.update.mismatch_by_age for report in reports]
    assert all(each.get(0, 0.0) < 1e-4 for each in ages)
    assert 0 in ages[0]
    assert max(gap for each in ages for age, gap in each.items() if age) > 1e-3
