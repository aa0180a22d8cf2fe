"""`baltoro env run` as a process, before a server that speaks vLLM's interface: killed, interrupted, refused."""

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from baltoro import cli
from baltoro.agent.engine import Sampling
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.trace import Trace, Turn
from baltoro.chat.messages import TokenSequence, assistant
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.record import Record, read_episodes
from baltoro.rollout.summary import Estimate, estimate, lines, summary

SOURCE = str(Path(__file__).parents[2] / "src")
T = Tokenizer({bytes([b]): b for b in range(256)})
CALLS = 4
ENV = """
from contextlib import asynccontextmanager

from baltoro.agent.loop import Limits
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Reward
from baltoro.rollout.toolset import toolset


@asynccontextmanager
async def open_world(task, seed):
    async def add(x: int) -> str:
        '''Add to the sum.'''
        sums.append(sums[-1] + x)
        return f"sum {sums[-1]}"

    sums = [task["start"]]
    yield World((f"start {task['start']}",), toolset(add))


env = Env(
    "sums",
    "1",
    lambda seed: {"start": 100 * seed},
    open_world,
    Judge(Reward("right", lambda task, trace: float(trace.final_text == str(task["start"] + 10)))),
    Limits(max_turns=6, max_context_tokens=4096, max_turn_tokens=400),
)
"""


class Server:
    """Adds 1, 2, 3 and 4 and answers with the sum that it was told, in odd tasks with another one. Log-probabilities
    follow from the question alone. `broken` is the status of every answer, if not 0."""

    def __init__(self) -> None:
        self.asked = Counter[tuple[tuple[int, ...], int]]()
        self.broken = 0
        self.pause_s = 0.0
        self.enough = math.inf
        self.reached = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.broken:
            return web.Response(status=self.broken)
        ids, seed = tuple(body["prompt"]), body["seed"]
        self.asked[ids, seed] += 1
        if self.asked.total() >= self.enough:
            self.reached.set()
        await asyncio.sleep(self.pause_s)
        said = T.decode(ids)
        turn = said.count("sum ")
        start = int(said.partition("start ")[2].partition("<")[0])
        if turn < 4:
            text = completion_text(calls=[("add", {"x": turn + 1})], first_index=turn)
        else:
            told = int(said.rpartition("sum ")[2].partition("<")[0])
            text = completion_text(str(told + start // 100 % 2))
        drawn = await ScriptedEngine(T, [text]).generate(TokenSequence(list(ids)), Sampling(400), "")
        logprobs = [-((seed + i) % 7) / 8 for i in range(len(drawn.ids))]
        choice = {"token_ids": drawn.ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice]})


@contextlib.asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def start(folder: Path, *words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "baltoro.cli", *words),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )


class Terminal:
    """Runs commands in a thread, each with an event loop of its own: a process takes seconds to begin."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    async def __call__(self, *words: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(cli.main, words)
        out, error = self._capsys.readouterr()
        return status, out, error


@pytest.fixture
def baltoro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.py").write_text(ENV)
    T.save(tmp_path / "k.tiktoken")
    return Terminal(tmp_path, capsys)


def command(url: str, *words: str) -> Sequence[str]:
    settings = ("model=m", "tokenizer=k.tiktoken", f"calls={CALLS}", "tasks=6", "rollouts=3")
    return ("env", "run", "sums.py", f"upstream={url}", *settings, *words)


def kept(file: Path) -> dict[tuple[str, int], Any]:
    records = read_episodes(file).records
    told = {(r.group, r.seed): (r.task, r.trace.tokens, r.trace.logprobs, r.reward) for r in records}
    assert len(told) == len(records)
    return told


@pytest.mark.timeout(300)
async def test_a_run_that_is_killed_and_interrupted_goes_on(baltoro: Terminal) -> None:
    """18 episodes of 5 turns; what comes out in the end is what a run without any of this leaves."""
    calm, rough = Server(), Server()
    async with serving(calm) as url:
        status, out, error = await baltoro(*command(url, "folder=calm"))
    assert (status, error) == (0, "")
    assert "18 episodes: 18 completed" in out
    # Half of the tasks are right, all episodes of each: ones and zeros, three each, so the error is sqrt(0.3 / 6).
    rows = {words[0]: words[-3:] for line in out.splitlines() if len(words := line.split()) > 3}
    assert rows["reward"] == rows["right"] == rows["best"] == ["0.5", "0.22", "6"]
    assert rows["turns"] == ["5", "0", "6"]
    assert calm.asked.total() == len(calm.asked) == 90

    async with serving(rough) as url:
        rough.pause_s = 0.1
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
            rough.enough = rough.asked.total() + 20
            rough.reached.clear()
            process = await start(baltoro.folder, *command(url, "folder=rough"))
            await rough.reached.wait()
            process.send_signal(number)
            _, told = await process.communicate()
            error, status = told.decode(), process.returncode
            assert status == (130 if number == signal.SIGINT else -number)
            if number == signal.SIGINT:
                assert error.startswith("baltoro: interrupted; to resume, run again: baltoro env run sums.py")
                assert error.count("\n") == 1
        rough.enough = math.inf
        assert (await baltoro(*command(url, "folder=rough")))[0] == 0
        asked = rough.asked.total()
        assert (await baltoro(*command(url, "folder=rough")))[0] == 0
        assert rough.asked.total() == asked

        assert kept(baltoro.folder / "rough/episodes.jsonl") == kept(baltoro.folder / "calm/episodes.jsonl")
        # Every end costs the calls in flight and those of the last commits, never all 20 before.
        assert rough.asked.keys() == calm.asked.keys()
        assert asked < 90 + 2 * 20

        status, out, _ = await baltoro(*command(url, "folder=rough", "rollouts=4"))
        assert (status, "24 episodes: 24 completed" in out) == (0, True)
        assert rough.asked.total() == asked + 6 * 5
    status, out, _ = await baltoro("trace", "verify", "rough/episodes.jsonl", "env=sums.py")
    assert (status, out.splitlines()[-1]) == (0, "24 episodes, no findings")
    assert (await baltoro("trace", "view", "rough/episodes.jsonl"))[0] == 0
    # Without a server, too: nothing is missing.
    assert (await baltoro(*command("http://127.0.0.1:9", "folder=rough")))[0] == 0


async def test_episodes_that_failed_are_missing_and_run_again(baltoro: Terminal) -> None:
    server = Server()
    async with serving(server) as url:
        server.broken = 400
        status, out, _ = await baltoro(*command(url))
        assert (status, "18 more are missing, failed: ValueError: the server answered 400" in out) == (1, True)
        assert kept(baltoro.folder / "runs/sums/episodes.jsonl") == {}
        server.broken = 0
        status, out, _ = await baltoro(*command(url))
        assert (status, len(kept(baltoro.folder / "runs/sums/episodes.jsonl"))) == (0, 18)


async def test_a_mistake_is_one_line(baltoro: Terminal) -> None:
    server = Server()
    async with serving(server) as url:
        words = command(url, "tasks=1", "rollouts=1")
        assert (await baltoro(*words))[0] == 0
        (baltoro.folder / "else").mkdir()
        (baltoro.folder / "else/episodes.jsonl").write_text("x\n")
        (baltoro.folder / "sums2.py").write_text(ENV.replace('"1",', '"2",'))
        server.pause_s = 1e6
        busy = await start(baltoro.folder, *words, "folder=busy")
        server.enough = 0
        await server.reached.wait()
        for more, says in (
            (["temperature=0.5"], "runs/sums holds a run with another temperature (1.0, not 0.5); choose another"),
            (["model=n"], "runs/sums holds a run with another model (m, not n)"),
            (["folder=else"], "else holds something else; choose another folder="),
            (["folder=busy"], "busy is in use by another run"),
            (["upstream=http://127.0.0.1:9", "folder=new"], "http://127.0.0.1:9 cannot be reached"),
            (["tokenizer=absent"], "No such file or directory: absent"),
            (["checkpoint=x"], "give upstream= (a model server) or else checkpoint= (a folder)"),
        ):
            status, _, error = await baltoro(*words, *more)
            assert (status, error.count("\n")) == (2, 1)
            assert says in error
        for file, says in (("absent.py", "No such file or directory: absent.py"), ("sums2.py", "another environment")):
            status, _, error = await baltoro("env", "run", file, *words[3:], "folder=runs/sums")
            assert (status, error.count("\n")) == (2, 1)
            assert says in error
        busy.kill()
        await busy.communicate()


def record(group: str, seed: int, reward: float | None, turns: int, **signals: float) -> Record:
    said = tuple(Turn(3, (1, 2), (-1.0, -1.0), 0, assistant("x"), (), (), i, i + 0.5, i + 1.0) for i in range(turns))
    trace = Trace("agent", (), (), (), (), (), said, "completed", "x", True, signals=signals)
    return Record("e", "1", {}, group, seed, trace, {"right": 1.0}, reward)


def near(found: Estimate, mean: float, error: float, tasks: int) -> bool:
    return (found.mean, found.error, found.tasks) == (pytest.approx(mean), pytest.approx(error), tasks)


def test_means_are_those_of_tasks() -> None:
    """Task a: 1, 0 of two; b: 1 of one, whose other episode has no reward; c: 0, 0."""
    records = [
        record("a", 1, 1.0, 1, right=1.0),
        record("a", 2, 0.0, 3, right=0.0),
        record("b", 1, 1.0, 2, right=1.0),
        record("b", 2, None, 2),
        record("c", 1, 0.0, 4, right=0.0, late=1.0),
        record("c", 2, 0.0, 4, right=0.0, late=3.0),
    ]
    told = summary(records, 2)
    # 1/2, 1 and 0: their variance is 1/4.
    assert told["reward"] == told["right"]
    assert near(told["reward"], 0.5, math.sqrt(0.25 / 3), 3)
    # b has not had two chances; a had its best of 1, c of 0.
    assert near(told["best of 2"], 0.5, 0.5, 2)
    assert (told["late"].mean, told["late"].tasks) == (2.0, 1)
    assert math.isnan(told["late"].error)
    assert near(told["turns"], 8 / 3, 2 / 3, 3)
    assert told["tokens drawn"].mean == pytest.approx(16 / 3)
    assert told["seconds"].mean == pytest.approx(8 / 3)
    text = "\n".join(lines(records, 2, Counter({"crashed: OSError: no\nspace": 2})))
    assert "1 of them have no reward" in text
    assert "2 more are missing, crashed: OSError: no space" in text


def test_no_tasks_have_no_mean() -> None:
    assert estimate([[], []]) is None
    assert lines([], 4, Counter()) == ["0 episodes"]
