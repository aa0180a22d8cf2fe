"""Prompts that begin alike are kept once: in memory, in the file, and read once from what the upstream tells."""

import asyncio
import contextlib
import json
import sqlite3
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from hypothesis import given
from hypothesis import strategies as st

from baltoro.rollout.gateway.answer import Drawn
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.graph import Call, Session, extending
from baltoro.rollout.gateway.relay import Relay
from baltoro.rollout.gateway.said import Said, Setting
from baltoro.rollout.gateway.sqlite import SqliteStore
from baltoro.rollout.gateway.store import Store

SETTING = Setting((), True)


def dialogue(*texts: str) -> list[Said]:
    return [Said("assistant" if i % 2 else "user", (text,)) for i, text in enumerate(texts)]


def ask(session: Session, said: list[Said], ids: list[int], answer: str = "a") -> Call:
    """`ids`: of the whole prompt. The answer is token 9."""
    place, added = session.fit(session.place(SETTING, said), array("i", ids))
    told = Said("assistant", (answer,))
    drawn = Drawn(array("i", [9]), array("d", [-1.0]), array("i", [0]))
    return session.add(place, SETTING, said, added, drawn, told, "stop", "chat", 0.0, 1.0)


def stored(session: Session) -> tuple[int, int]:
    """Messages and tokens of all prompts."""
    prompts = {call.prompt.first: call.prompt for call in session.calls}.values()
    return sum(len(one.new_said) for one in prompts), sum(len(one.new_ids) for one in prompts)


def test_a_fork_keeps_what_it_adds() -> None:
    session = Session("s")
    ask(session, dialogue("u0"), [1, 2, 3, 0])
    history = dialogue("u0", "a", "u1", "not recorded", "u2")
    ask(session, history, [1, 2, 3, 0, 9, 4, 5, 6, 7, 8, 0], "b")
    # Behind the first answer too: u1 and two tokens of u2 are as they were.
    fork = [*history[:-1], Said("user", ("other",))]
    call = ask(session, fork, [1, 2, 3, 0, 9, 4, 5, 6, 7, 3, 3, 3, 0], "c")
    assert (call.prompt.parent, call.prompt.new_said, call.prompt.new_ids.tolist()) == (0, (fork[-1],), [3, 3, 3, 0])
    assert stored(session) == (1 + 3 + 1, 4 + 6 + 4)
    assert call.prompt.ids.tolist() == [4, 5, 6, 7, 3, 3, 3, 0]
    assert list(call.prompt.said) == fork[2:]


def test_a_history_whose_answers_are_not_on_record_is_kept_once() -> None:
    """Each turn has ten tokens; the last two of a prompt ask for an answer and stand in no longer one."""
    session = Session("s")
    texts = [f"t{i}" for i in range(41)]
    for turns in range(1, 42, 2):
        ids = [100 * turn + i for turn in range(turns) for i in range(10)]
        call = ask(session, dialogue(*texts[:turns]), [*ids, 7, 7], "unlike what comes back")
        assert call.prompt.ids.tolist() == [*ids, 7, 7]
        assert len(call.prompt.said) == turns
    assert stored(session) == (41, 41 * 10 + 21 * 2)


def test_equal_beginnings_hang_on_one_prompt() -> None:
    """A thousand variants of one question make no chain of a thousand."""
    session = Session("s")
    for i in range(1000):
        ask(session, dialogue("u", "v", f"{i}"), [*range(100), 1000 + i])
    assert session.calls[-1].prompt.base is session.calls[0].prompt
    assert stored(session) == (2 + 1000, 100 + 1000)


def test_more_tokens_may_be_shared_than_messages_say() -> None:
    """The third shares one message with the second and three tokens; the second, two and one with the first."""
    x, y, z, w, v, q = dialogue(*"xyzwvq")
    first = extending(None, b"", None, 0, [x, y, z], array("i", [1, 2, 3]))
    second = extending(first, b"", None, 1, [x, y, w, v], array("i", [1, 5, 6, 7]))
    third = extending(second, b"", None, 2, [x, q], array("i", [1, 5, 6, 8]))
    assert (third.same_said, third.same_ids, third.base) == (1, 3, second)
    assert (third.said, third.ids.tolist()) == ((x, q), [1, 5, 6, 8])
    assert second.said == (x, y, w, v)


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=7), min_size=1, max_size=12))
def test_whatever_is_shared_every_prompt_is_what_was_read(dialogues: list[list[str]]) -> None:
    session = Session("s")
    asked: list[tuple[list[Said], list[int]]] = []
    for i, texts in enumerate(dialogues):
        said = dialogue(*texts)
        # Two tokens a message, one of which depends on what stands behind it, as with byte pairs.
        ids = [token for a, b in zip(texts, [*texts[1:], "end"], strict=True) for token in (ord(a), ord(b[0]))]
        ask(session, said, ids, f"{i}")
        asked.append((said, ids))
    for call, (said, ids) in zip(session.calls, asked, strict=True):
        chain = session.chain(call.prompt.parent)
        whole = [token for one in chain for part in (one.prompt.ids, one.ids) for token in part]
        assert [*whole, *call.prompt.ids] == ids
        assert [*(one for c in chain for one in (*c.prompt.said, c.answer)), *call.prompt.said] == said


class Upstream:
    """Like vLLM: tells the ids of prompt and answer. Each character of the dialogue is a token."""

    def __init__(self) -> None:
        self.app = web.Application(client_max_size=2**24)
        self.app.router.add_post("/v1/chat/completions", self._answer)
        self.content = "x"

    async def _answer(self, request: web.Request) -> web.Response:
        messages = (await request.json())["messages"]
        choice = {
            "message": {"role": "assistant", "content": self.content},
            "finish_reason": "stop",
            "token_ids": [1],
            "logprobs": {"content": [{"logprob": -1.0}]},
        }
        ids = [ord(letter) for message in messages for letter in message["content"]]
        return web.json_response({"choices": [choice], "prompt_token_ids": [*ids, 0]})


@contextlib.asynccontextmanager
async def relayed(upstream: Upstream, store: Store | None = None) -> AsyncIterator[tuple[Api, ClientSession]]:
    up = web.AppRunner(upstream.app, access_log=None)
    await up.setup()
    await web.TCPSite(up, "127.0.0.1", 0).start()
    relay = Relay(f"http://127.0.0.1:{up.addresses[0][1]}/v1", "", 2**20)
    api = Api(relay, ApiConfig("m", max_choices=100, max_body=2**24), store)
    runner = api.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with relay.run(), ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
        yield api, http
    await runner.cleanup()
    await up.cleanup()


async def post(http: ClientSession, texts: list[str], session: str = "s") -> Any:
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    body = {"model": "m", "messages": messages, "return_token_ids": True}
    async with http.post(f"/sessions/{session}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


@pytest.mark.parametrize(
    "content",
    ["x", '"prompt_token_ids": [5]', "\\", '\\"prompt_token_ids":[5', ' "prompt_token_ids"'],
)
async def test_what_the_upstream_read_is_recorded_whatever_the_answer_says(content: str) -> None:
    upstream = Upstream()
    upstream.content = content
    histories = (["ab", "c", "de"], ["ab", "c", "df", "g", "h"], ["ab", "c", "d"], ["b"], ["ab", "c", "de"])
    async with relayed(upstream) as (api, http):
        for texts in histories:
            answer = await post(http, texts)
            assert answer["prompt_token_ids"] == [*map(ord, "".join(texts)), 0]
            assert answer["choices"][0]["message"]["content"] == content
        calls = (await api.session("s")).calls
    assert [c.prompt.ids.tolist() for c in calls] == [[*map(ord, "".join(texts)), 0] for texts in histories]


async def test_a_key_of_that_name_elsewhere_in_the_answer_is_not_taken_for_it() -> None:
    class Twice(Upstream):
        async def _answer(self, request: web.Request) -> web.Response:
            body = json.loads((await super()._answer(request)).text or "")
            return web.json_response({"extra": {"prompt_token_ids": [5, 6]}, **body})

    async with relayed(Twice()) as (_, http):
        assert (await post(http, ["ab"]))["prompt_token_ids"] == [ord("a"), ord("b"), 0]


def test_the_file_keeps_a_history_once(tmp_path: Path) -> None:
    """50 prompts of 10,000 tokens and more: one of them and what the others add are on disk."""
    file = tmp_path / "calls.db"
    texts = ["u" * 10_000]

    async def talk() -> Session:
        with SqliteStore(file) as store:
            async with relayed(Upstream(), store) as (api, http):
                for i in range(50):
                    await post(http, [*texts, "never said", f"{i:02}"])
                return await api.session("s")

    was = asyncio.run(talk())
    with contextlib.closing(sqlite3.connect(file)) as connection:
        ids, said = connection.execute("SELECT sum(length(added)), sum(length(said)) FROM calls").fetchone()
    # Each adds at most its two digits and the end, four bytes each.
    assert ids <= 4 * (10_000 + 10 + 50 * 3)
    assert said < 10_000 + 50 * 60
    with SqliteStore(file) as store:
        loaded = asyncio.run(store.load("s"))
    assert loaded is not None
    for a, b in zip(was.calls, loaded.calls, strict=True):
        assert (a.prompt.ids, a.prompt.said) == (b.prompt.ids, b.prompt.said)
    assert loaded.calls[7].prompt.ids.tolist() == [*[ord("u")] * 10_000, *map(ord, "never said07"), 0]


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "calls.db"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE calls (session TEXT)")
    with pytest.raises(ValueError, match="another version"), SqliteStore(file):
        pass
