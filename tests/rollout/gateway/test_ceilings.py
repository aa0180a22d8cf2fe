"""Ceilings that other gateways hit without saying so: pools, threads, connections, work that grows with the history."""

import asyncio
import base64
import contextlib
import io
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession, TCPConnector, web
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage

from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Image
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway import dialogue, said
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.chat_request import AnyTurn, AssistantTurn, Call, FunctionCall, ToolTurn, UserTurn
from baltoro.rollout.gateway.dialogue import NOTHING, read_dialogue
from baltoro.rollout.gateway.engine import EngineUpstream
from baltoro.rollout.gateway.heard import Heard
from baltoro.rollout.gateway.relay import Relay
from baltoro.rollout.gateway.sqlite import SqliteStore
from baltoro.rollout.gateway.upstream import Upstream

T = Tokenizer({bytes([b]): b for b in range(256)})
ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@contextlib.asynccontextmanager
async def serving(app: web.Application | Api) -> AsyncIterator[str]:
    runner = app.runner() if isinstance(app, Api) else web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def gateway(upstream: Upstream, store: Any = None) -> Api:
    return Api(upstream, ApiConfig("m", max_choices=1000, max_body=2**24), store)


def engine() -> EngineUpstream:
    return EngineUpstream(ScriptedEngine(T, lambda prompt, role: completion_text("x")), T, MediaSpec.K25, 100_000)


class Mock:
    """An upstream that answers when `wanted` requests are in it."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._all = asyncio.Event()
        self._inside = 0
        self.connections: set[Any] = set()
        self.app = web.Application()
        self.app.router.add_post("/v1/chat/completions", self._answer)

    async def _answer(self, request: web.Request) -> web.Response:
        self.connections.add(request.transport)
        self._inside += 1
        if self._inside >= self._wanted:
            self._all.set()
        await self._all.wait()
        choice = {
            "message": {"role": "assistant", "content": "x"},
            "finish_reason": "stop",
            "token_ids": [1],
            "logprobs": {"content": [{"logprob": -1.0}]},
        }
        return web.json_response({"choices": [choice], "prompt_token_ids": [2]})


async def test_three_hundred_requests_pass_through_at_once() -> None:
    mock = Mock(300)
    async with serving(mock.app) as up:
        relay = Relay(f"{up}/v1", "", 1000)
        async with (
            relay.run(),
            serving(gateway(relay)) as url,
            ClientSession(url, connector=TCPConnector(limit=0)) as http,
            asyncio.timeout(60),
            asyncio.TaskGroup() as group,
        ):

            async def ask(i: int) -> None:
                async with http.post(f"/sessions/s{i % 7}/v1/chat/completions", json=ASK) as response:
                    assert response.status == 200

            for i in range(300):
                group.create_task(ask(i))


async def test_requests_one_after_another_use_one_connection() -> None:
    mock = Mock(1)
    async with serving(mock.app) as up:
        relay = Relay(f"{up}/v1", "", 1000)
        async with relay.run(), serving(gateway(relay)) as url, ClientSession(url) as http:
            for _ in range(30):
                async with http.post("/sessions/s/v1/chat/completions", json=ASK) as response:
                    await response.read()
    assert len(mock.connections) == 1


async def test_a_program_that_blocks_all_of_asyncios_threads_does_not_stop_the_gateway(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    release = threading.Event()
    pool = ThreadPoolExecutor(2)
    loop.set_default_executor(pool)
    blocked = [loop.run_in_executor(None, release.wait) for _ in range(10)]
    with SqliteStore(tmp_path / "calls.db") as store:
        async with (
            serving(gateway(engine(), store)) as url,
            ClientSession(url) as http,
            asyncio.timeout(30),
            http.post("/sessions/s/v1/chat/completions", json=ASK) as response,
        ):
            assert response.status == 200
    release.set()
    await asyncio.gather(*blocked)


async def test_while_a_picture_is_decoded_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Event(), threading.Event()
    decode = said.decode_image

    def slow(data: bytes) -> Image:
        begun.set()
        assert release.wait(30)
        return decode(data)

    monkeypatch.setattr(said, "decode_image", slow)
    file = io.BytesIO()
    PilImage.fromarray(np.zeros((30, 30, 3), np.uint8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    body = {**ASK, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    async with serving(gateway(engine())) as address, ClientSession(address) as http, asyncio.TaskGroup() as group:

        async def show() -> int:
            async with http.post("/sessions/s/v1/chat/completions", json=body) as response:
                return response.status

        shown = group.create_task(show())
        while not begun.is_set():
            await asyncio.sleep(0.01)
        async with http.post("/sessions/t/v1/chat/completions", json=ASK) as response:
            assert response.status == 200
        release.set()
        assert await shown == 200


async def test_a_turn_reads_what_it_adds_and_not_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    one: Any = dialogue._Reader.read  # pyright: ignore[reportPrivateUsage]

    def count(self: Any, turn: AnyTurn, place: str) -> Any:
        read.append(place)
        return one(self, turn, place)

    monkeypatch.setattr(dialogue._Reader, "read", count)  # pyright: ignore[reportPrivateUsage]
    async with serving(gateway(engine())) as url, ClientSession(url) as http:
        messages: list[Any] = [{"role": "user", "content": "u"}]
        for turn in range(40):
            read.clear()
            async with http.post("/sessions/s/v1/chat/completions", json={**ASK, "messages": messages}) as response:
                answer = (await response.json())["choices"][0]["message"]
            assert len(read) == (1 if turn == 0 else 2)
            messages += [answer, {"role": "user", "content": f"u{turn}"}]


async def test_what_stands_behind_a_known_history_is_checked_and_so_is_what_changed_in_it() -> None:
    async with serving(gateway(engine())) as url, ClientSession(url) as http:

        async def say(*messages: Any) -> tuple[int, Any]:
            body = {**ASK, "messages": messages}
            async with http.post("/sessions/s/v1/chat/completions", json=body) as response:
                return response.status, (await response.json()).get("error", {}).get("param")

        one, two, bad = ({"role": "user", "content": content} for content in ("a", "b", 5))
        assert await say(one, two) == (200, None)
        assert await say(one, two, bad) == (400, "messages.2.content")
        assert await say(one, bad) == (400, "messages.1.content")
        assert await say(one, two, {**two, "role": "assistant"}, one) == (200, None)
        assert await say({**one, "x": 1}, two) == (400, "messages.0.x")


def _turn(draw: st.DrawFn, i: int) -> AnyTurn:
    text = draw(st.sampled_from(["a", "b"]))
    match draw(st.integers(0, 2)):
        case 0:
            return UserTurn(role="user", content=text)
        case 1:
            call = Call(id=f"{text}{i}", function=FunctionCall(name="f", arguments="{}"))
            return AssistantTurn(role="assistant", content=text, tool_calls=[call])
        case _:
            return ToolTurn(role="tool", content=text, tool_call_id="a0")


@st.composite
def _two_dialogues(draw: st.DrawFn) -> tuple[list[AnyTurn], list[AnyTurn]]:
    """Both begin with the call that tool messages answer; the second shares some turns with the first."""
    first: AnyTurn = AssistantTurn(
        role="assistant", tool_calls=[Call(id="a0", function=FunctionCall(name="f", arguments="{}"))]
    )
    old = [first, *(_turn(draw, i) for i in range(1, draw(st.integers(1, 6))))]
    kept = draw(st.integers(1, len(old)))
    return old, [*old[:kept], *(_turn(draw, i) for i in range(kept, kept + draw(st.integers(0, 4))))]


@given(_two_dialogues())
def test_what_was_read_before_is_as_if_it_were_read_again(dialogues: tuple[list[AnyTurn], list[AnyTurn]]) -> None:
    old, new = dialogues
    before = read_dialogue(old)
    same = Heard((), old, before, b"", []).same(new)
    assert old[:same] == new[:same]
    assert read_dialogue(new, (), before, same).said == read_dialogue(new, (), NOTHING).said


def test_many_threads_encode_alike() -> None:
    """One tokenizer serves all threads: its encoder keeps no state between calls."""
    texts = ["".join(chr(32 + (i * j) % 90) for j in range(4000)) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(T.encode, texts)) == [T.encode(text) for text in texts]


def test_no_pool_of_httpx_is_on_the_way() -> None:
    """Its cost is quadratic in the requests that wait for a connection."""
    code = "import sys, baltoro.rollout.gateway.command as _; print('httpx' in sys.modules, 'torch' in sys.modules)"
    source = str(Path(__file__).parents[3] / "src")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True)
    assert done.stdout == "False False\n"
