"""Retries, pauses, keys, limits, metrics; and what is on disk when the process is killed."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from array import array
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

from baltoro.agent.engine import Sampled, Sampling
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.answer import Drawn
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream
from baltoro.rollout.gateway.graph import Session
from baltoro.rollout.gateway.said import Said, Setting
from baltoro.rollout.gateway.sqlite import SqliteStore

T = Tokenizer({bytes([b]): b for b in range(256)})
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Held(ScriptedEngine):
    """Answers a0, a1, ... when it is let."""

    def __init__(self) -> None:
        super().__init__(T, [completion_text(f"a{i}") for i in range(20)])
        self.let = asyncio.Event()
        self.let.set()
        self.entered = asyncio.Semaphore(0)

    async def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        self.entered.release()
        await self.let.wait()
        async for sampled in super().stream(prompt, sampling, role):
            yield sampled._replace(logprob=-1 / (1 + sampled.token))


class Server:
    def __init__(self, api: Api, http: ClientSession) -> None:
        self.api = api
        self._http = http

    async def post(self, path: str = "/sessions/s/v1/chat/completions", body: Any = ASK, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._http.post(path, json=body, headers=named) as response:
            text = await response.text()
            if response.content_type == "text/event-stream":
                return text
            answer = json.loads(text)
            return answer["choices"][0]["message"]["content"] if "choices" in answer else (response.status, answer)

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        async with self._http.get(path, headers=headers) as response:
            return response.status, await response.text()


@contextlib.asynccontextmanager
async def serving(engine: Held, **changes: Any) -> AsyncIterator[Server]:
    config = replace(ApiConfig("m", max_choices=8, max_body=2**20), **changes)
    api = Api(EngineUpstream(engine, T, MediaSpec.K25, 4000), config)
    runner = api.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
        yield Server(api, http)
    await runner.cleanup()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repetition_gets_the_first_answer_and_is_recorded_once(stream: bool) -> None:
    body = {**ASK, "stream": stream}
    async with serving(Held()) as server:
        first = await server.post(body=body, X_Stainless_Retry_Count="0")
        again = await server.post(body=body, X_Stainless_Retry_Count="1")
        assert again == first
        named = [await server.post(body=body, Idempotency_Key="k") for _ in range(2)]
        assert named[0] == named[1] != first
        # One that does not say so is a new request, even though it is equal.
        assert await server.post(body=body) not in (first, named[0])
        assert len((await server.api.session("s")).calls) == 3
        assert server.api.metrics.replayed == 2


async def test_a_repetition_of_a_request_in_flight_waits_for_its_answer() -> None:
    engine = Held()
    engine.let.clear()
    async with serving(engine) as server, asyncio.TaskGroup() as group:
        first = group.create_task(server.post())
        await engine.entered.acquire()
        again = group.create_task(server.post(X_Stainless_Retry_Count="1"))
        await asyncio.sleep(0.05)
        engine.let.set()
        assert (await first, await again) == ("a0", "a0")
        assert len(engine.prompts) == 1


async def test_a_repetition_of_a_request_whose_client_left_is_answered_anew() -> None:
    engine = Held()
    engine.let.clear()
    async with serving(engine) as server:
        left = asyncio.ensure_future(server.post())
        await engine.entered.acquire()
        left.cancel()
        while json.loads((await server.get("/health"))[1])["running"]:
            await asyncio.sleep(0.01)
        engine.let.set()
        assert await server.post(X_Stainless_Retry_Count="1") == "a0"
        assert len((await server.api.session("s")).calls) == 1


async def test_pause_refuses_and_lets_the_running_end() -> None:
    engine = Held()
    engine.let.clear()
    async with serving(engine, admin_key="boss") as server, asyncio.TaskGroup() as group:
        running = group.create_task(server.post())
        await engine.entered.acquire()
        assert (await server.post("/admin/pause"))[0] == 401
        assert await server.post("/admin/pause", Authorization="Bearer boss") == (
            200,
            {"paused": True, "draining": False},
        )
        for path, kind in (("chat/completions", "rate_limit_error"), ("messages", "rate_limit_error")):
            status, answer = await server.post(f"/sessions/s/v1/{path}")
            assert (status, answer["error"]["type"]) == (429, kind)
        engine.let.set()
        assert await running == "a0"
        await server.post("/admin/resume", Authorization="Bearer boss")
        assert await server.post() == "a1"
        assert 'baltoro_gateway_requests_total{dialect="chat",status="429"} 1\n' in (await server.get("/metrics"))[1]


async def test_keys_open_what_is_theirs_and_limits_hold_for_each() -> None:
    engine = Held()
    engine.let.clear()
    async with serving(engine, api_keys=("k1", "k2"), admin_key="boss", max_key_choices=1) as server:
        assert (await server.post())[0] == 401
        async with asyncio.TaskGroup() as group:
            running = group.create_task(server.post(Authorization="Bearer k1"))
            await engine.entered.acquire()
            # On every path, and whichever header bears the key.
            for path in ("/v1/chat/completions", "/sessions/t/v1/messages", "/sessions/s/v1/responses"):
                assert (await server.post(path, x_api_key="k1"))[0] == 429
            other = group.create_task(server.post(Authorization="Bearer k2"))
            await engine.entered.acquire()
            engine.let.set()
            assert {await running, await other} == {"a0", "a1"}
        for path in ("/sessions/s", "/sessions/s/"):
            assert (await server.get(path, Authorization="Bearer k1"))[0] in (401, 404)
        status, text = await server.get("/sessions/s", Authorization="Bearer boss")
        kept = json.loads(text)["calls"]
        assert (status, len(kept)) == (200, 2)
        assert kept[0]["completion_ids"] == [T.end_think, *b"a0", T.im_end]
        assert kept[1]["same_prompt_as"] == 0
        assert (await server.get("/metrics"))[0] == 401


async def test_a_sessions_id_cannot_leave_its_place() -> None:
    async with serving(Held()) as server:
        for id in ("..%2f..%2fetc", "a%20b", "x" * 129):
            assert (await server.post(f"/sessions/{id}/v1/chat/completions"))[0] == 400


def test_what_is_saved_is_loaded_as_it_was(tmp_path: Path) -> None:
    async def talk(file: Path) -> tuple[Any, Any]:
        with SqliteStore(file) as store:
            engine = Held()
            config = ApiConfig("m", max_choices=8, max_body=2**20)
            api = Api(EngineUpstream(engine, T, MediaSpec.K25, 4000), config, store)
            runner = api.runner()
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
            body = {**ASK, "n": 2, "tools": [{"type": "function", "function": tool}]}
            async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
                server = Server(api, http)
                await server.post(body=body)
                history = [*ASK["messages"], {"role": "assistant", "content": "a1"}, {"role": "user", "content": "on"}]
                await server.post(body={**body, "n": 1, "messages": history})
            await runner.cleanup()
            was = await api.session("s")
        with SqliteStore(file) as store:
            return was, await store.load("s")

    was, loaded = asyncio.run(talk(tmp_path / "calls.db"))
    assert len(loaded.calls) == 3
    for a, b in zip(was.calls, loaded.calls, strict=True):
        assert (a.ids, a.logprobs, a.versions, a.answer, a.finish, a.broke) == (
            b.ids,
            b.logprobs,
            b.versions,
            b.answer,
            b.finish,
            b.broke,
        )
        assert (a.prompt.parent, a.prompt.first, a.prompt.said, a.prompt.ids) == (
            b.prompt.parent,
            b.prompt.first,
            b.prompt.said,
            b.prompt.ids,
        )
        assert a.setting == b.setting
    assert [call.prompt.parent for call in loaded.calls] == [None, None, 1]


SERVER = """
import asyncio, sys, time
from pathlib import Path
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream
from baltoro.rollout.gateway.server import serve
from baltoro.rollout.gateway.graph import Session
from baltoro.rollout.gateway.said import Said, Setting
from baltoro.rollout.gateway.sqlite import SqliteStore
import contextlib

T = Tokenizer({bytes([b]): b for b in range(256)})

@contextlib.asynccontextmanager
async def running():
    yield

class Slow(SqliteStore):
    def _commit(self, connection, batches):
        time.sleep(0.05)
        return super()._commit(connection, batches)

async def main():
    with Slow(Path(sys.argv[1])) as store:
        engine = ScriptedEngine(T, lambda prompt, role: completion_text(prompt[-60:].upper(), reasoning="r"))
        api = Api(EngineUpstream(engine, T, MediaSpec.K25, 4000), ApiConfig("m", 64, 2**20), store)
        await serve(api, running(), "127.0.0.1", 0)

asyncio.run(main())
"""


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    """Sixteen clients, whole and streamed; SIGKILL in the midst of them, at whatever moment it falls. The disk is slow,
    so that an answer told too early would be lost."""
    file = tmp_path / "calls.db"
    told: dict[str, list[tuple[int, ...]]] = {}

    async def one(http: ClientSession, name: str, stream: bool) -> None:
        for i in range(10_000):
            body = {"model": "m", "messages": [{"role": "user", "content": f"{name} {i}"}], "stream": stream}
            ids: list[int] = []
            try:
                async with http.post(
                    f"/sessions/{name}/v1/chat/completions", json={**body, "return_token_ids": True}
                ) as response:
                    if not stream:
                        ids = (await response.json())["choices"][0]["token_ids"]
                    else:
                        text = await response.text()
                        assert text.endswith("data: [DONE]\n\n")
                        for line in text.split("\n\n")[:-2]:
                            for choice in json.loads(line[6:])["choices"]:
                                ids += choice.get("token_ids", [])
            except Exception:
                return  # the server is dead
            told.setdefault(name, []).append(tuple(ids))

    async def clients(url: str, kill: Any) -> None:
        async with ClientSession(url) as http, asyncio.TaskGroup() as group:
            for i in range(16):
                group.create_task(one(http, f"c{i}", i % 2 == 1))
            while sum(map(len, told.values())) < 80:
                await asyncio.sleep(0.01)
            kill()

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    command = [sys.executable, "-c", SERVER, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("listening on ").strip().removesuffix("/v1")
        asyncio.run(clients(url, lambda: process.send_signal(signal.SIGKILL)))
    assert process.returncode == -signal.SIGKILL
    with SqliteStore(file) as store:
        kept = {name: asyncio.run(store.load(name)) for name in told}
    assert sum(map(len, told.values())) >= 80
    for name, answers in told.items():
        session = kept[name]
        assert session is not None
        # What was saved last may not have been told any more.
        assert [tuple(call.ids) for call in session.calls][: len(answers)] == answers
        assert len(session.calls) <= len(answers) + 1


def test_the_store_commits_batches_in_one_thread(tmp_path: Path) -> None:
    """500 calls that come at once are not 500 transactions, and none is committed on the event loop."""
    commits: list[str] = []

    class Counting(SqliteStore):
        def _commit(self, connection: sqlite3.Connection, batches: Any) -> Any:
            commits.append(threading.current_thread().name)
            return super()._commit(connection, batches)

    async def save() -> None:
        session, setting, said = Session("s"), Setting((), True), [Said("user", ("hi",))]
        with Counting(tmp_path / "calls.db") as store:
            calls = [
                session.add(
                    session.place(setting, said),
                    setting,
                    said,
                    array("i", [1]),
                    Drawn(array("i", [2]), array("d", [-1.0]), array("i", [0])),
                    Said("assistant", (f"{i}",)),
                    "stop",
                    "chat",
                    0.0,
                    1.0,
                )
                for i in range(500)
            ]
            async with asyncio.TaskGroup() as group:
                for call in calls:
                    group.create_task(store.save(session, [call], {}))

    asyncio.run(save())
    assert len(commits) < 50
    assert set(commits) == {"gateway store"}
