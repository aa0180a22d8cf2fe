"""Episodes that are cut and go on: what was answered is not asked again, and nothing else changes."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import baltoro
from baltoro.agent.engine import Completion, Sampling
from baltoro.agent.tool import CallContext, ToolResult
from baltoro.agent.trace import Trace
from baltoro.chat.messages import Clip, Image, MediaItem, Part, TokenSequence, ToolSpec, Video
from baltoro.rollout.journal import Journal
from baltoro.rollout.manager import Ended, ManagerConfig, RolloutManager
from baltoro.rollout.partial import Resumable, resumable


@pytest.mark.timeout(300)
def test_episodes_survive_fifty_kills(tmp_path: Path) -> None:
    """200 nested episodes; every one is trained on once, with the tokens of a run that nobody killed."""
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), "200", "50", "7"]
    path = str(Path(baltoro.__path__[0]).parent)
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    report: dict[str, Any] = json.loads(run.stdout)
    calm, rough = report["calm"], report["rough"]
    assert (report["killed"], calm["code"], rough["code"], run.stderr) == (50, 0, 0, "")
    assert len(rough["trained"]) == 200
    assert {id: told for id, told, _ in rough["trained"]} == {id: told for id, told, _ in calm["trained"]}
    # Every kill costs the calls in flight (at most 32) and those of the last commits, never those before.
    assert rough["questions"] == calm["questions"] == calm["asked"]
    assert rough["asked"] < 2 * rough["questions"]
    agents = [versions for _, _, tree in rough["trained"] for versions in tree]
    assert len(agents) > 300
    assert all(versions == sorted(versions) for versions in agents)
    assert any(len(set(versions)) > 1 for versions in agents)


class Counting:
    """Answers with the number of the call, under a version that may be set."""

    def __init__(self) -> None:
        self.calls = 0
        self.version = 1
        self.failing = False

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        self.calls += 1
        if self.failing:
            raise RuntimeError("no")
        await asyncio.sleep(0)
        return Completion([self.calls], [-0.25], "stop", self.version)


class Counted:
    spec = ToolSpec("t", "", {"type": "object"})
    sequential = False

    def __init__(self, *content: Part) -> None:
        self.content = content
        self.calls = 0

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        self.calls += 1
        return ToolResult(self.content, error="e", steps=2)


def trace(status: Any = "completed") -> Trace:
    return Trace("agent", (), (), (), (), (), (), status, "", True)


class Long:
    """Asks `turns` times, calls its tool after each, and stops before the turn `until` to be cut there."""

    def __init__(self, tool: Counted, turns: int) -> None:
        self.tool = tool
        self.turns = turns
        self.until: int | None = None
        self.said: list[Completion] = []
        self.results: list[ToolResult] = []

    async def __call__(self, episode: Resumable) -> Trace:
        tool = episode.tool(self.tool)
        self.said, self.results = [], []
        for turn in range(self.turns):
            if turn == self.until:
                await asyncio.sleep(1e9)
            self.said.append(await episode.generate(TokenSequence([turn]), Sampling(9, seed=turn), "agent"))
            self.results.append(await tool.call({"x": turn}, CallContext(None, turn, 0.0)))
        return trace()


async def until_cut(engine: Counting, journal: Journal, long: Long) -> Ended:
    manager = RolloutManager(engine, ManagerConfig(retries={}))
    async with manager.run():
        running = await manager.submit("e", resumable(journal, long))
        if long.until is not None:
            while len(long.results) < long.until:
                await asyncio.sleep(0.001)
            await manager.cut()
        return await running.ended()


async def test_a_cut_episode_goes_on_under_newer_weights(tmp_path: Path) -> None:
    engine, tool = Counting(), Counted("seen")
    long = Long(tool, 5)
    async with Journal.open(tmp_path / "j") as journal:
        long.until = 2
        assert (await until_cut(engine, journal, long)).outcome == "suspended"
        engine.version = 2
        long.until = 4
        assert (await until_cut(engine, journal, long)).outcome == "suspended"
    async with Journal.open(tmp_path / "j") as journal:
        engine.version, long.until = 3, None
        assert (await until_cut(engine, journal, long)).outcome == "completed"
    assert [each.ids for each in long.said] == [[1], [2], [3], [4], [5]]
    assert [each.weight_version for each in long.said] == [1, 1, 2, 2, 3]
    assert (engine.calls, tool.calls) == (5, 5)
    assert long.results == [ToolResult(("seen",), error="e", steps=2)] * 5


async def test_a_call_that_failed_is_asked_again(tmp_path: Path) -> None:
    engine = Counting()
    engine.failing = True
    async with Journal.open(tmp_path / "j") as journal:
        long = Long(Counted(), 1)
        assert (await until_cut(engine, journal, long)).outcome == "crashed"
        engine.failing = False
        assert (await until_cut(engine, journal, long)).outcome == "completed"


@pytest.mark.parametrize(
    ("ids", "media", "seed", "role"), [([2], 0, 5, "a"), ([1], 1, 5, "a"), ([1], 0, 6, "a"), ([1], 0, 5, "b")]
)
async def test_another_question_is_no_repetition(
    tmp_path: Path, ids: list[int], media: int, seed: int, role: str
) -> None:
    engine = Counting()
    item = MediaItem(np.zeros((4, 3, 2, 2), np.float32), (1, 2, 2))

    async def ask(ids: list[int], media: int, seed: int, role: str) -> Completion:
        async def one(episode: Resumable) -> Trace:
            said.append(await episode.generate(TokenSequence(ids, [item] * media), Sampling(9, seed=seed), role))
            return trace()

        said: list[Completion] = []
        manager = RolloutManager(engine, ManagerConfig())
        async with manager.run():
            await manager.submit("e", resumable(journal, one))
        return said[0]

    async with Journal.open(tmp_path / "j") as journal:
        first = await ask([1], 0, 5, "a")
        assert await ask([1], 0, 5, "a") == first
        assert await ask(ids, media, seed, role) != first


pixels = npst.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(3)))
frames = npst.arrays(np.uint8, st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.just(3)))
parts = st.one_of(
    st.text(st.characters()),
    pixels.map(Image),
    st.builds(Clip, frames, st.floats(0.1, 60)),
    st.binary().map(Video),
    st.just(Video(Path("/films/a.mp4"))),
)


def plain(content: Sequence[Part]) -> list[object]:
    told: list[object] = []
    for part in content:
        match part:
            case str():
                told.append(part)
            case Image(pixels):
                told.append(("image", pixels.tolist()))
            case Clip(frames, fps):
                told.append(("clip", frames.tolist(), fps))
            case Video(file):
                told.append(("video", file))
    return told


@settings(max_examples=25, deadline=None)
@given(content=st.lists(parts, max_size=4), logprobs=st.lists(st.floats(-80, 0), max_size=5))
def test_what_is_remembered_is_what_was_answered(
    tmp_path_factory: pytest.TempPathFactory, content: list[Part], logprobs: list[float]
) -> None:
    said = Completion(list(range(163_000, 163_000 + len(logprobs))), logprobs, "length", 7)
    answers: list[tuple[Completion, ToolResult]] = []

    class Saying(Counting):
        async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
            await super().generate(prompt, sampling, role)
            return said

    async def one(episode: Resumable) -> Trace:
        completion = await episode.generate(TokenSequence([1]), Sampling(1), "agent")
        answers.append((completion, await episode.tool(tool).call({}, CallContext(None, 0, 0.0))))
        return trace()

    async def twice() -> None:
        for _ in range(2):
            async with Journal.open(path) as journal:
                manager = RolloutManager(engine, ManagerConfig())
                async with manager.run():
                    await manager.submit("e", resumable(journal, one))

    path = tmp_path_factory.mktemp("journal") / "j"
    engine, tool = Saying(), Counted(*content)
    asyncio.run(twice())
    assert (engine.calls, tool.calls) == (1, 1)
    (_, _), (again, result) = answers
    assert again == said
    assert plain(result.content) == plain(content)
    assert (result.error, result.steps) == ("e", 2)
