"""Sessions: what is one dialogue and what breaks it, each answer trained once, nothing kept twice."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from openai import AsyncOpenAI

from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream

T = Tokenizer({bytes([b]): b for b in range(256)})
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


class Talk:
    """A client that says what it likes; the model counts its answers: a0, a1, ..."""

    def __init__(self, api: Api, client: AsyncOpenAI, engine: ScriptedEngine) -> None:
        self.api = api
        self.engine = engine
        self._client = client

    async def say(self, *texts: str, session: str = "s", **more: Any) -> str:
        """`texts`: of system, user, assistant, user, assistant, ... in turn."""
        roles = ["system", *["user", "assistant"] * len(texts)]
        messages: list[Any] = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        base = self._client.base_url.copy_with(path=f"/sessions/{session}/v1/")
        client = self._client.with_options(base_url=base)
        answer = await client.chat.completions.create(model="m", messages=messages, **more)
        return answer.choices[0].message.content or ""

    async def traces(self) -> tuple[Trace, ...]:
        return await self.api.traces("s")

    async def broke(self) -> list[str]:
        return [call.broke for call in (await self.api.session("s")).calls]


@contextlib.asynccontextmanager
async def talking(answers: list[str] | None = None) -> AsyncIterator[Talk]:
    engine = ScriptedEngine(T, answers or [completion_text(f"a{i}", reasoning=f"r{i}") for i in range(20)])
    api = Api(EngineUpstream(engine, T, MediaSpec.K25, 4000), ApiConfig("m", max_choices=8, max_body=2**20))
    runner = api.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield Talk(api, client, engine)
    await runner.cleanup()


def trained(trace: Trace) -> str:
    """The tokens that are targets, answers in lines."""
    ids = [token for token, target in zip(trace.tokens, trace.loss_mask, strict=True) if target]
    return T.decode(ids).replace("<|im_end|>", "\n")


async def test_an_answer_that_comes_back_stays_as_it_was_drawn() -> None:
    """The client saw no reasoning and stripped the answer; the second prompt has both all the same."""
    async with talking([completion_text(" a0 ", reasoning="why"), completion_text("a1")]) as talk:
        assert await talk.say("s", "u0") == " a0 "
        await talk.say("s", "u0", "a0", "u1")
        second = talk.engine.prompts[1].ids
        (trace,) = await talk.traces()
    assert T.decode(second) == (
        "<|im_system|>system<|im_middle|>s<|im_end|><|im_user|>user<|im_middle|>u0<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>why</think> a0 <|im_end|>"
        "<|im_user|>user<|im_middle|>u1<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    )
    assert trained(trace) == "why</think> a0 \n</think>a1\n"


async def test_an_answer_cut_off_is_closed_by_a_token_that_is_no_target() -> None:
    async with talking() as talk:
        # r0 </think> a 0 would come next.
        cut = await talk.say("s", "u0", max_tokens=4)
        assert cut == "a"
        await talk.say("s", "u0", cut, "u1")
        (trace,) = await talk.traces()
    assert trained(trace) == "r0</think>ar1</think>a1\n"
    end = trace.turns[0].prompt_len + 4
    assert (trace.tokens[end], trace.loss_mask[end]) == (T.im_end, 0)


@pytest.mark.parametrize(
    ("texts", "more", "broke", "reused"),
    [
        (("s", "u0", "a0", "u1", "a1", "u2"), {}, "", 2),
        (("s", "u0", "a0", "other"), {}, "message 3 was edited", 1),
        (("s", "u0", "not a0", "u1"), {}, "message 2 was edited", 0),
        (("other", "u0", "a0", "u1"), {}, "the system prompt changed", 0),
        (("s", "u0", "a0", "u1"), {"tools": TOOLS}, "the tools changed", 0),
        (
            ("s", "u0", "a0", "u1"),
            {"extra_body": {"thinking": {"type": "disabled"}}},
            "the thinking mode changed",
            0,
        ),
        (("s", "u1", "a1", "u2"), {}, "the history was cut: 2 messages from message 1 on are missing", 0),
        (("s", "u0", "a0", "u1"), {}, "the same prompt was asked again", 1),
        (("s", "u0"), {}, "the same prompt was asked again", 0),
        (("s", "u0", "a0"), {}, "the history was cut off", 1),
    ],
)
async def test_why_a_dialogue_breaks_is_said(
    texts: tuple[str, ...], more: dict[str, Any], broke: str, reused: int
) -> None:
    """After s u0 a0 u1 a1. What is reused are the answers on record before the break, with their reasoning."""
    async with talking() as talk:
        await talk.say("s", "u0")
        await talk.say("s", "u0", "a0", "u1")
        await talk.say(*texts, **more)
        assert await talk.broke() == ["", "", broke]
        prompt = T.decode(talk.engine.prompts[2].ids)
        assert sum(f"r{i}</think>a{i}" in prompt for i in range(2)) == reused
        traces = await talk.traces()
    assert [trace.broke for trace in traces] == ([broke] if not broke else ["", broke])
    # Each answer once.
    learnt = "".join(trained(trace) for trace in traces).splitlines()
    assert sorted(learnt) == ["r0</think>a0", "r1</think>a1", "r2</think>a2"]


async def test_two_agents_in_one_session_are_two_dialogues_and_break_nothing_of_each_other() -> None:
    async with talking() as talk:
        await talk.say("s", "main")
        await talk.say("sub", "task")
        await talk.say("s", "main", "a0", "go on")
        await talk.say("sub", "task", "a1", "more")
        assert await talk.broke() == ["", "the system prompt changed", "", ""]
        traces = await talk.traces()
    assert [trained(trace) for trace in traces] == ["r0</think>a0\nr2</think>a2\n", "r1</think>a1\nr3</think>a3\n"]
    assert [len(trace.turns) for trace in traces] == [2, 2]


async def test_several_answers_to_one_prompt_share_its_tokens() -> None:
    async with talking() as talk:
        await talk.say("s", "u0", n=3)
        await talk.say("s", "u0")
        calls = (await talk.api.session("s")).calls
        assert len(calls) == 4
        assert len({id(call.prompt) for call in calls}) == 1
        traces = await talk.traces()
        # The client goes on from one of them.
        await talk.say("s", "u0", "a2", "u1")
        assert calls[-1].prompt.parent == 2
    assert [trained(trace) for trace in traces] == [f"r{i}</think>a{i}\n" for i in range(4)]


async def test_sessions_are_apart_and_without_one_nothing_is_kept() -> None:
    async with talking() as talk:
        await talk.say("s", "u0")
        await talk.say("s", "u0", session="other")
        assert len(await talk.traces()) == 1
        with pytest.raises(ValueError, match="made no call"):
            await talk.api.traces("third")


async def test_placing_costs_one_look_up_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session of 60 turns: each message of a request is looked up once, and what is new is entered."""
    from baltoro.rollout.gateway import graph

    counted = 0
    chained: Callable[..., bytes] = graph.chained

    def count(*args: Any) -> bytes:
        nonlocal counted
        counted += 1
        return chained(*args)

    async with talking([completion_text(f"a{i}") for i in range(60)]) as talk:
        texts = ["s"]
        for i in range(60):
            texts.append(f"u{i}")
            monkeypatch.setattr(graph, "chained", count)
            counted = 0
            answer = await talk.say(*texts)
            assert counted <= len(texts) + 3
            texts.append(answer)
