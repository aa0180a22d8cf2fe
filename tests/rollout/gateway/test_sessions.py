"""Idle sessions leave the memory and go on from the store as if they had stayed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web

from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream
from baltoro.rollout.gateway.graph import Session
from baltoro.rollout.gateway.sessions import Sessions
from baltoro.rollout.gateway.sqlite import SqliteStore
from baltoro.rollout.gateway.store import MemoryStore, Store

T = Tokenizer({bytes([b]): b for b in range(256)})


@contextlib.asynccontextmanager
async def serving(engine: ScriptedEngine, max_held: int, store: Store) -> AsyncIterator[tuple[Api, ClientSession]]:
    config = ApiConfig("m", max_choices=100, max_body=2**20, max_held=max_held)
    api = Api(EngineUpstream(engine, T, MediaSpec.K25, 4000), config, store)
    runner = api.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
        yield api, http
    await runner.cleanup()


async def say(http: ClientSession, *texts: str, session: str = "s", **more: Any) -> str:
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    body = {"model": "m", "messages": messages, **more}
    async with http.post(f"/sessions/{session}/v1/chat/completions", json=body) as response:
        return (await response.json())["choices"][0]["message"]["content"]


async def held(http: ClientSession) -> int:
    async with http.get("/metrics") as response:
        return int((await response.text()).split("\nbaltoro_gateway_sessions ")[1].split("\n")[0])


async def test_a_forgotten_session_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    """Two sessions by turns, a fork, a prompt asked twice, several answers; all idle ones forgotten, or none."""
    prompts: list[list[list[int]]] = []
    traces: list[Any] = []
    for max_held in (0, 2**30):
        engine = ScriptedEngine(T, [completion_text(f"a{i}", reasoning=f"why {i}") for i in range(20)])
        with SqliteStore(tmp_path / f"{max_held}.db") as store:
            async with serving(engine, max_held, store) as (api, http):
                for name in ("s", "t"):
                    await say(http, "u", session=name)
                await say(http, "u", "a0", "v")
                await say(http, "u", "a1", "v", session="t")
                await say(http, "u", "a0", "v", "never said", "w", n=2)
                await say(http, "u", "a0", "v", "never said", "x")
                await say(http, "u", "a0", "v", "a2", "y")
                await say(http, "u", "a0", "v", "a2", "y")
                assert await held(http) == (0 if max_held == 0 else 2)
                prompts.append([prompt.ids for prompt in engine.prompts])
                kept = [await api.traces(name) for name in ("s", "t")]
                traces.append([[(t.tokens, t.loss_mask, t.broke) for t in one] for one in kept])
    assert prompts[0] == prompts[1]
    assert traces[0] == traces[1]
    # The model's reasoning, which no client sent back, stands in what it read.
    assert "why 2</think>a2" in T.decode(prompts[0][-1])


async def test_what_is_asked_at_once_is_one_session(tmp_path: Path) -> None:
    """Forty requests in two sessions that are forgotten whenever nobody uses them."""
    engine = ScriptedEngine(T, lambda prompt, role: completion_text("x"))
    with SqliteStore(tmp_path / "calls.db") as store:
        async with serving(engine, 0, store) as (_, http):
            for _ in range(4):
                async with asyncio.TaskGroup() as group:
                    for i in range(10):
                        group.create_task(say(http, f"{i}", session="st"[i % 2]))
            assert await held(http) == 0
        for name in "st":
            session = await store.load(name)
            assert session is not None
            assert [call.number for call in session.calls] == list(range(20))
            assert {call.prompt.said[0].content[0] for call in session.calls} == set(
                "02468" if name == "s" else "13579"
            )


async def test_the_longest_idle_is_forgotten_first() -> None:
    """A session counts as much as the texts of its calls, and something for each."""
    loaded: list[str] = []

    class Told(MemoryStore):
        async def load(self, session: str) -> Session | None:
            loaded.append(session)
            return await super().load(session)

    engine = ScriptedEngine(T, lambda prompt, role: completion_text("x"))
    async with serving(engine, 12_000, Told()) as (_, http):
        for name in "abac":
            await say(http, "u" * 500, session=name)  # with as many tokens of 4 bytes and its objects: some 5 kB each
        assert await held(http) == 2
        await say(http, "u" * 500, session="b")
    assert loaded == ["a", "b", "c", "b"]


async def test_a_session_in_use_is_the_same_object_for_all() -> None:
    sessions = Sessions(MemoryStore(), 0)
    async with sessions.using("s") as first:
        async with sessions.using("s") as second:
            assert first is second
        async with sessions.using("s") as third:
            assert third is first
    assert len(sessions) == 1  # it is empty: nothing is gained by forgetting it


async def test_a_session_is_loaded_with_what_is_not_in_the_database_yet(tmp_path: Path) -> None:
    engine = ScriptedEngine(T, lambda prompt, role: completion_text("x"))
    with SqliteStore(tmp_path / "calls.db") as store:
        async with serving(engine, 2**30, store) as (api, http):
            await say(http, "u")
            session = await api.session("s")
            copy = Session("t")
            copy.restore(session.calls[0])
            await store.save(copy, copy.calls, {})
            loaded = await store.load("t")
    assert loaded is not None
    assert len(loaded.calls) == 1
