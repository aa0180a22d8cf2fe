"""An ordinary `openai` program in a process of its own, behind the gateway, against the white-box loop."""

import asyncio
import dataclasses
import random
import re
import sys

import pytest

from baltoro.agent.engine import Sampling
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rl.black_box import program
from baltoro.score.table import item_f1, parse_table
from baltoro.swarm.client import Job
from baltoro.swarm.demonstrations import NOTICE
from baltoro.swarm.wide import Library, WideRules, solve
from baltoro.world.entities import World
from baltoro.world.tasks import WideSearch, wide_search

T = Tokenizer({bytes([b]): b for b in range(256)})
MEDIA = MediaSpec(8, 2, 256, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 4)
RULES = WideRules(max_context_tokens=3000, max_turn_tokens=400)
TURNS = 5
CLIENT = (sys.executable, "-m", "baltoro.swarm.client")


def _agent(prompt: str, role: str) -> str:
    """Searches and opens one name after another and thinks aloud; babbles where it was asked about one name only."""
    names = re.findall(r"\n[①-⑳]([^\n|<]+)", prompt.split("<|im_assistant|>")[0])
    pages = re.findall(r"\n([^\n]+)((?:\n\|[^\n<]+)+)<", prompt.split("<|im_assistant|>", 1)[1])
    rows = "\n".join(name + page.replace("\n", "") for name, page in pages)
    if NOTICE in prompt or len(pages) == len(names):
        return completion_text(rows, reasoning="done")
    searched = prompt.count("functions.search:") // 2  # once as a call, once as its result's name
    name = names[len(pages)]
    if searched == len(pages):
        return completion_text(reasoning=rows, calls=[("search", {"query": name})])
    return completion_text("", calls=[("open", {"url": name}), ("open", {"page": 1})])


def _task(seed: int) -> tuple[World, WideSearch]:
    world = World(seed, "train")
    return world, wide_search(random.Random(seed), world, 1, 3)


async def _white(engine: ScriptedEngine, seed: int) -> Trace:
    world, task = _task(seed)
    library = Library(world.documents)
    sampling = Sampling(RULES.max_turn_tokens, seed=seed)
    return await solve(
        engine, T, MEDIA, task, library, mode="single", critical_steps=TURNS, sampling=sampling, rules=RULES, role="m"
    )


def _job(seed: int) -> dict[str, object]:
    return dataclasses.asdict(Job("m", seed, "train", _task(seed)[1].prompt, seed, TURNS, RULES.max_turn_tokens))


async def test_the_program_leaves_the_tokens_of_the_white_box_loop() -> None:
    engine = ScriptedEngine(T, _agent)
    async with program(CLIENT, engine, T, MEDIA, "m", RULES.max_context_tokens) as running:
        solved = await asyncio.gather(*(running.solve(f"s{seed}", _job(seed)) for seed in range(12)))
    kinds: set[str] = set()
    for seed, (answer, trace) in enumerate(solved):
        white = await _white(engine, seed)
        kinds.add(white.status)
        if white.status != "overflow":
            assert answer == white.final_text
            assert (trace.tokens, trace.loss_mask) == (white.tokens, white.loss_mask)
        else:  # the program learns of it from a refusal, and the dialogue ends where it stood
            assert (answer, trace.tokens) == ("", white.tokens[: len(trace.tokens)])
        assert trace.trainable
        task = _task(seed)[1]
        assert item_f1(parse_table(answer, task.columns), task.gold) == white.signals["perf"]
        turns = [(turn.prompt_len, turn.ids) for turn in trace.turns]
        assert turns == [(turn.prompt_len, turn.ids) for turn in white.turns]
    assert {"completed", "limit"} <= kinds


async def test_what_fails_in_the_program_fails_here_and_alone() -> None:
    engine = ScriptedEngine(T, _agent)
    async with program(CLIENT, engine, T, MEDIA, "m", RULES.max_context_tokens) as running:
        bad = _job(1) | {"model": "another"}
        results = await asyncio.gather(running.solve("a", bad), running.solve("b", _job(2)), return_exceptions=True)
        assert isinstance(results[0], RuntimeError)
        assert "there is no model another" in str(results[0])
        assert isinstance(results[1], tuple)


async def test_the_end_of_the_program_ends_what_waits_for_it() -> None:
    command = (sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)")
    async with program(command, ScriptedEngine(T, _agent), T, MEDIA, "m", RULES.max_context_tokens) as running:
        with pytest.raises(RuntimeError, match="ended with status 3"):
            await running.solve("a", _job(1))


async def test_an_answer_may_be_long() -> None:
    """Two million letters, where asyncio reads lines of 64 KB."""
    command = (
        "import json, os, sys, urllib.request as web\n"
        "told = json.loads(sys.stdin.readline())\n"
        "body = json.dumps({'model': 'm', 'messages': [{'role': 'user', 'content': 'hi'}]}).encode()\n"
        "headers = {'Authorization': 'Bearer ' + os.environ['OPENAI_API_KEY'], 'Content-Type': 'application/json'}\n"
        "web.urlopen(web.Request(told['base_url'] + '/chat/completions', body, headers)).read()\n"
        "print(json.dumps({'session': told['session'], 'answer': 'é' * 2_000_000}), flush=True)\n"
    )
    engine = ScriptedEngine(T, lambda prompt, role: completion_text("yes"))
    async with program((sys.executable, "-c", command), engine, T, MEDIA, "m", 3000) as running:
        answer, trace = await running.solve("a", _job(1))
    assert answer == "é" * 2_000_000
    assert trace.final_text == "yes"
