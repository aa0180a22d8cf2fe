"""The server over real sockets, asked by OpenAI's own client. The model is a script, so that every word is known."""

import asyncio
import base64
import contextlib
import copy
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, cast

import av
import numpy as np
import openai
import pytest
from aiohttp import ClientSession, web
from hypothesis import event, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from PIL import Image as PilImage

from baltoro.agent.chaos import Chaos, ChaosEngine
from baltoro.agent.engine import Sampled, Sampling, StreamingEngine
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.chat.declare import declare_tools
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence, ToolSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream

T = Tokenizer({bytes([b]): b for b in range(256)})
ASK: list[Any] = [{"role": "user", "content": "hi"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE = {
    "type": "object",
    "properties": {
        "city": {"type": ["string", "null"], "pattern": "^a"},
        "more": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["city"],
    "additionalProperties": {"anyOf": [{"type": "number", "maximum": 3}, {"$ref": "#/$defs/x"}]},
    "$defs": {"x": {"enum": ["p", 1]}},
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
TWO_CALLS = completion_text("Let me see.", reasoning="two ☃", calls=[("weather", {"city": "Zürich"}), ("weather", {})])


@contextlib.asynccontextmanager
async def served(engine: StreamingEngine, **changes: Any) -> AsyncIterator[AsyncOpenAI]:
    config = {"name": "m", "max_choices": 8, "max_body": 2**20} | changes
    api = Api(EngineUpstream(engine, T, MediaSpec.K25, 4000), ApiConfig(**config))
    runner = api.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client
    await runner.cleanup()


async def collected(stream: Any) -> dict[str, Any]:
    """What a client makes of the chunks, per choice and field."""
    text: dict[str, Any] = {"reasoning": "", "content": "", "calls": [], "finish": None, "usage": None, "chunks": 0}
    async for chunk in stream:
        text["usage"] = chunk.usage or text["usage"]
        text["chunks"] += 1
        for choice in chunk.choices:
            delta = choice.delta
            text["content"] += delta.content or ""
            text["reasoning"] += getattr(delta, "reasoning_content", "")
            text["finish"] = choice.finish_reason or text["finish"]
            for call in delta.tool_calls or ():
                if call.id:
                    assert call.index == len(text["calls"])
                    text["calls"].append([call.id, call.function.name, ""])
                text["calls"][call.index][2] += call.function.arguments
    return text


async def test_reasoning_content_and_parallel_calls_whole() -> None:
    engine = ScriptedEngine(T, [TWO_CALLS])
    async with served(engine) as client:
        answer = await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)
    choice = answer.choices[0]
    message: Any = choice.message
    assert (message.content, message.reasoning_content, choice.finish_reason) == ("Let me see.", "two ☃", "tool_calls")
    assert [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("functions.weather:0", "weather", '{"city": "Zürich"}'),
        ("functions.weather:1", "weather", "{}"),
    ]
    # The schema is not forced on the model; where it is not met, the answer says so.
    assert message.parse_errors == ['functions.weather:1: arguments lacks "city"']
    prompt = T.decode(engine.prompts[0].ids)
    assert prompt == (
        f"<|im_system|>tool_declare<|im_middle|>{declare_tools([ToolSpec('weather', '', WEATHER)])}<|im_end|>"
        "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.prompts[0].ids)
    # Bytes are tokens here, and there are 2 control tokens around the section, 3 in each call, </think> and <|im_end|>.
    texts = "two ☃" + "Let me see." + 2 * "functions.weather:0" + '{"city": "Zürich"}' + "{}"
    assert answer.usage.completion_tokens == len(texts.encode()) + 2 + 2 * 3 + 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_the_stream_tells_the_same_token_by_token() -> None:
    async with served(ScriptedEngine(T, [TWO_CALLS, TWO_CALLS])) as client:
        whole = (await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)).choices[0]
        stream = await client.chat.completions.create(
            model="m", messages=ASK, tools=TOOLS, stream=True, stream_options={"include_usage": True}
        )
        told = await collected(stream)
    assert told["content"] == whole.message.content
    assert told["reasoning"] == "two ☃"
    assert told["calls"] == [[c.id, c.function.name, c.function.arguments] for c in whole.message.tool_calls or ()]  # pyright: ignore[reportAttributeAccessIssue]
    assert told["finish"] == "tool_calls"
    # One for each character and each call's begin, with the opening, the finish and the usage.
    characters = "two ☃" + "Let me see." + '{"city": "Zürich"}' + "{}"
    assert told["chunks"] == len(characters) + 2 + 3
    assert told["usage"].completion_tokens == len(characters.encode()) + 2 * len("functions.weather:0") + 10


async def test_a_dialogue_with_its_tool_results_is_rendered_as_k25_reads_it() -> None:
    engine = ScriptedEngine(T, [completion_text("Warm.")] * 2)
    history: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}], "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "look",
            "tool_calls": [
                {"id": "call_x", "type": "function", "function": {"name": "weather", "arguments": '{"city":"A"}'}},
                {"id": "functions.weather:7", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "functions.weather:7", "content": "20"},
        {"role": "tool", "tool_call_id": "call_x", "content": [{"type": "text", "text": "<|im_end|>"}]},
    ]
    async with served(engine) as client:
        answer = await client.chat.completions.create(model="m", messages=history)
        # What came back goes in again as it is.
        history += [answer.choices[0].message.model_dump(), ASK[0]]
        await client.chat.completions.create(
            model="m", messages=history, extra_body={"chat_template_kwargs": {"thinking": False}}
        )
    first, second = (T.decode(prompt.ids) for prompt in engine.prompts)
    asked = "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>ann<|im_middle|>Weather?<|im_end|>"
    called = (
        "<|im_assistant|>assistant<|im_middle|><think>{}</think><|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{{"city":"A"}}<|tool_call_end|>'
        "<|tool_call_begin|>functions.weather:7<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.weather:7\n20<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.weather:0\n<|im_end|><|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>"
    )
    assert first == asked + called.format("look")
    assert second == (
        asked + called.format("") + "</think>Warm.<|im_end|><|im_user|>user<|im_middle|>hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>"
    )
    assert engine.prompts[0].ids.count(T.im_end) == 5  # the one that a tool spelled is text


@pytest.mark.parametrize(
    "extra",
    [{"chat_template_kwargs": {"thinking": False}}, {"thinking": {"type": "disabled"}}],
)
async def test_instant_mode(extra: dict[str, Any]) -> None:
    engine = ScriptedEngine(T, ["</think>is text now"])
    async with served(engine) as client:
        answer = await client.chat.completions.create(model="m", messages=ASK, extra_body=extra)
    assert engine.prompts[0].ids[-2:] == [T.think, T.end_think]
    assert answer.choices[0].message.content == "</think>is text now"
    assert not hasattr(answer.choices[0].message, "reasoning_content")


async def test_reasoning_is_kept_on_request() -> None:
    engine = ScriptedEngine(T, lambda prompt, role: completion_text("x"))
    history: list[Any] = [{"role": "assistant", "content": "a", "reasoning_content": "why"}, *ASK]
    async with served(engine) as client:
        for extra in ({}, {"thinking": {"type": "enabled", "keep": "all"}}):
            await client.chat.completions.create(model="m", messages=history, extra_body=extra)
    assert ["<think>why</think>a" in T.decode(prompt.ids) for prompt in engine.prompts] == [False, True]


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    PilImage.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _mp4(frames: int, fps: int) -> str:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = 56, 28
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((28, 56, 3), 20 * i, np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    return "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode()


async def test_pictures_and_videos_come_as_data_urls() -> None:
    engine = ScriptedEngine(T, [completion_text("A picture.")] * 2)
    picture = _png(np.full((30, 60, 3), (200, 10, 10), np.uint8))
    content: Any = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": picture}}]
    async with served(engine) as client:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
    (item,) = engine.prompts[0].media
    assert item.grid_thw == (1, 4, 6)  # 30 x 60 pixels in cells of 28: 2 x 3 of them, 2 x 2 patches each
    assert engine.prompts[0].ids.count(T.media_pad) == 6
    # A video of 2 s at 4 frames a second is seen at 2: one chunk of four frames, 28 x 56 pixels each.
    content = [{"type": "video_url", "video_url": {"url": _mp4(frames=8, fps=4)}}, {"type": "text", "text": "?"}]
    broken = [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}]
    async with served(engine) as client:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": cast(Any, content)}])
        with pytest.raises(openai.BadRequestError, match="not an MP4"):
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": cast(Any, broken)}])
    assert [chunk.grid_thw for chunk in engine.prompts[1].media] == [(4, 2, 4)]
    chunk = "00:00:00.000<|media_begin|>video<|media_content|><|media_pad|><|media_pad|><|media_end|>"
    assert f"<|im_middle|>{chunk}?<|im_end|>" in T.decode(engine.prompts[1].ids)
    # Red, normalised by (v / 255 - 0.5) / 0.5; then black where it was padded.
    assert item.patches[0, :, 0, 0] == pytest.approx([200 / 127.5 - 1, 10 / 127.5 - 1, 10 / 127.5 - 1], abs=1e-6)
    assert (item.patches[-1, :, -1, -1] == -1).all()


async def test_token_ids_and_logprobs_of_every_token() -> None:
    text = completion_text("é", reasoning="r")
    ids = [ord("r"), T.end_think, *"é".encode(), T.im_end]
    engine = ScriptedEngine(T, [text, text])
    extra = {"return_token_ids": True}
    async with served(engine) as client:
        answer = await client.chat.completions.create(model="m", messages=ASK, logprobs=True, extra_body=extra)
        stream = await client.chat.completions.create(
            model="m", messages=ASK, logprobs=True, stream=True, extra_body=extra
        )
        chunks = [chunk async for chunk in stream]
    whole: Any = answer
    assert whole.prompt_token_ids == engine.prompts[0].ids
    assert whole.choices[0].token_ids == ids
    entries = answer.choices[0].logprobs
    assert entries is not None
    assert entries.content is not None
    assert [e.token for e in entries.content] == ["r", "</think>", "\ufffd", "\ufffd", "<|im_end|>"]
    assert [e.bytes for e in entries.content][2:4] == [[0xC3], [0xA9]]
    assert [e.logprob for e in entries.content] == [0.0] * 5
    first: Any = chunks[0]
    assert first.prompt_token_ids == engine.prompts[0].ids
    choices: list[Any] = [chunk.choices[0] for chunk in chunks]
    assert [i for choice in choices for i in getattr(choice, "token_ids", [])] == ids
    assert [e.token for c in choices if c.logprobs for e in c.logprobs.content] == [e.token for e in entries.content]


@pytest.mark.parametrize(
    ("stop", "content"),
    [
        ("END", "one EN"),
        (["zzz", "two"], "one EN END "),
        ("one", ""),
        (["N E", "EN E"], "one "),
        ("nd", "one EN END two EN"),
    ],
)
async def test_stop_strings_end_the_content_before_them(stop: Any, content: str) -> None:
    """The texts are one token a byte, so every stop string spans tokens. Reasoning is not searched."""
    engine = ScriptedEngine(T, [completion_text("one EN END two EN", reasoning="END two")] * 2)
    async with served(engine) as client:
        whole = (await client.chat.completions.create(model="m", messages=ASK, stop=stop)).choices[0]
        told = await collected(await client.chat.completions.create(model="m", messages=ASK, stop=stop, stream=True))
    assert (whole.message.content, whole.finish_reason) == (content if stop != "END" else "one EN ", "stop")
    assert (told["content"], told["finish"]) == (whole.message.content, "stop")


async def test_length_ends_a_turn_and_a_cut_call_is_not_called() -> None:
    """9 tokens: </think>, the section, the call, 6 bytes of its id; 30: into the arguments."""
    engine = ScriptedEngine(T, [completion_text(calls=[("weather", {"city": "Bern"})])] * 3)
    async with served(engine) as client:
        for limit in (9, 30):
            answer = await client.chat.completions.create(model="m", messages=ASK, max_tokens=limit)
            message: Any = answer.choices[0].message
            assert (answer.choices[0].finish_reason, message.tool_calls) == ("length", None)
            assert len(message.parse_errors) == 1
            assert answer.usage is not None
            assert answer.usage.completion_tokens == limit
        answer = await client.chat.completions.create(model="m", messages=ASK, max_completion_tokens=300)
        assert answer.choices[0].finish_reason == "tool_calls"


async def test_calls_are_limited_as_asked() -> None:
    engine = ScriptedEngine(T, [TWO_CALLS] * 2)
    async with served(engine) as client:
        one = await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS, parallel_tool_calls=False)
        none = await client.chat.completions.create(model="m", messages=ASK, tools=TOOLS, tool_choice="none")
    assert one.choices[0].finish_reason == "tool_calls"
    assert [c.id for c in one.choices[0].message.tool_calls or ()] == ["functions.weather:0"]
    assert (none.choices[0].finish_reason, none.choices[0].message.tool_calls) == ("stop", None)
    assert none.choices[0].message.content == "Let me see."
    assert "tool_declare" not in T.decode(engine.prompts[1].ids)


async def test_several_choices_with_seeds_of_their_own() -> None:
    engine = ScriptedEngine(T, lambda prompt, role: completion_text("abc", reasoning="r"))
    async with served(engine) as client:
        whole = await client.chat.completions.create(model="m", messages=ASK, n=3, seed=-5, temperature=0.5, top_p=0.9)
        stream = await client.chat.completions.create(model="m", messages=ASK, n=3, seed=-5, stream=True)
        told: dict[int, str] = {}
        async for chunk in stream:
            for choice in chunk.choices:
                told[choice.index] = told.get(choice.index, "") + (choice.delta.content or "")
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert told == dict.fromkeys(range(3), "abc")
    seeds = [sampling.seed for sampling in engine.samplings]
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3
    assert {(s.temperature, s.top_p) for s in engine.samplings[:3]} == {(0.5, 0.9)}


async def test_without_a_seed_each_request_draws_anew() -> None:
    engine = ScriptedEngine(T, [completion_text("x")] * 2)
    async with served(engine) as client:
        for _ in range(2):
            await client.chat.completions.create(model="m", messages=ASK)
    assert engine.samplings[0].seed != engine.samplings[1].seed


def _user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def _image(url: str) -> list[Any]:
    return _user({"type": "image_url", "image_url": {"url": url}})


def _tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not valid JSON"),
        (b"\xff\xfe\x00", 400, "not valid JSON"),
        (b"[" * 200_000, 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b'{"model": "m", "temperature": NaN}', 400, "not valid JSON: unexpected character"),
        ({"model": None}, 400, "model: Field required"),
        ({"model": "gpt", "messages": ASK}, 404, "there is no model gpt"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages.0: "),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content: "),
        (
            {"messages": [{"role": "tool", "content": "", "tool_call_id": "x"}]},
            400,
            "messages.0.tool_call_id: no assist",
        ),
        ({"messages": _user({"type": "audio"})}, 400, "messages.0.content.0: "),
        ({"messages": _image("http://169.254.169.254/latest")}, 400, "only data: URLs"),
        ({"messages": _image("file:///etc/passwd")}, 400, "only data: URLs"),
        ({"messages": _image("data:image/png;base64,iVBORw0KGgo=")}, 400, "messages.0.content.0.image_url.url: "),
        ({"messages": _image("data:image/png;base64,%%%")}, 400, "not valid base64"),
        ({"messages": _image("data:text/html,<p>")}, 400, "must read data:image/"),
        ({"temperature": 3}, 400, "temperature: "),
        ({"temperature": "1"}, 400, "temperature: "),
        ({"top_p": 0}, 400, "top_p: "),
        ({"n": 0}, 400, "n: "),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"max_tokens": 1.5}, 400, "max_tokens: "),
        ({"seed": 1e3}, 400, "seed: "),
        ({"stop": [""]}, 400, "stop.0: "),
        ({"logprobs": True, "top_logprobs": 2}, 400, "top_logprobs: "),
        ({"tool_choice": "required"}, 400, "tool_choice: "),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice: "),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type: "),
        ({"presence_penalty": 0.5}, 400, "presence_penalty: "),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias: "),
        ({"best_of": 2}, 400, "best_of: "),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0"),
        (_tool(name="a b"), 400, "tools.0.function.name: "),
        (_tool(parameters={"type": "array"}), 400, "tool f: parameters.type must be object"),
        (_tool(parameters={"properties": {"x": {"type": "text"}}}), 400, "parameters.properties.x.type must be"),
        (_tool(parameters={"properties": {"x": {"description": "?"}}}), 400, "has no TypeScript form"),
        ({"tools": [*TOOLS, *TOOLS]}, 400, "two tools have the name weather"),
        ({"messages": _user({"type": "text", "text": "a" * 4000})}, 400, "context is 4000 tokens"),
        ({"max_tokens": 3999}, 400, "context is 4000 tokens"),
        (b" " * 2**20 + b"{}", 413, "larger than"),
    ],
)
async def test_a_wrong_request_is_refused_in_openais_form(body: Any, status: int, says: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps({"model": "m", "messages": ASK} | body).encode()
    async with (
        served(ScriptedEngine(T, [])) as client,
        ClientSession() as session,
        session.post(f"{client.base_url}chat/completions", data=io.BytesIO(data)) as response,
    ):
        answer = await response.json()
    assert (response.status, answer.keys()) == (status, {"error"})
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert "Traceback" not in error["message"]


async def test_errors_reach_the_client_as_its_own_exceptions() -> None:
    async with served(ScriptedEngine(T, [])) as client:
        with pytest.raises(openai.BadRequestError) as long:
            await client.chat.completions.create(model="m", messages=ASK, max_tokens=5000)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.NotFoundError, match="there is no model x"):
            await client.models.retrieve("x")
        with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
            await client.embeddings.create(model="m", input="x")
        models = [model.id async for model in client.models.list()]
    assert models == ["m"]


async def test_an_engine_that_fails_is_a_500_and_in_a_stream_an_error_event(caplog: pytest.LogCaptureFixture) -> None:
    inner = ScriptedEngine(T, lambda prompt, role: completion_text("x"))
    async with served(ChaosEngine(inner, T, Chaos(drops=1.0), seed=0)) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model="m", messages=ASK, n=2)
        assert failed.value.code == "engine_failed"
        assert "Traceback" not in str(failed.value.body)
        outcomes: set[str] = set()
        for seed in range(16):
            try:
                stream = await client.chat.completions.create(model="m", messages=ASK, stream=True, seed=seed)
            except openai.InternalServerError:
                outcomes.add("before")
                continue
            with pytest.raises(openai.APIError, match="the engine failed"):
                await collected(stream)
            outcomes.add("within")
    assert outcomes == {"before", "within"}
    assert "ConnectionError: the engine did not answer" in caplog.text


async def test_a_key_is_asked_for() -> None:
    async with served(ScriptedEngine(T, [completion_text("x")]), api_keys=("s3cret",)) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.models.list()
        assert refused.value.code == "invalid_api_key"
        assert (await client.with_options(api_key="s3cret").models.list()).data[0].id == "m"
        async with ClientSession() as session, session.get(str(client.base_url)[:-4] + "/health") as health:
            assert health.status == 200


class _Waiting(ScriptedEngine):
    """Gives one token, then none until it is released; says who is in it."""

    def __init__(self) -> None:
        super().__init__(T, lambda prompt, role: completion_text("done"))
        self.inside = 0
        self.release = asyncio.Event()
        self.changed = asyncio.Condition()

    async def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        await self._move(1)
        try:
            async for sampled in super().stream(prompt, sampling, role):
                yield sampled
                await self.release.wait()
        finally:
            await asyncio.shield(self._move(-1))

    async def _move(self, change: int) -> None:
        async with self.changed:
            self.inside += change
            self.changed.notify_all()

    async def until(self, inside: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.inside == inside)


async def test_more_than_the_queue_holds_is_refused() -> None:
    engine = _Waiting()
    async with served(engine, max_choices=3) as client, asyncio.TaskGroup() as group:
        running = group.create_task(client.chat.completions.create(model="m", messages=ASK, n=2))
        await engine.until(2)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(model="m", messages=ASK, n=2)
        assert refused.value.code == "rate_limit_exceeded"
        engine.release.set()
        assert len((await running).choices) == 2
        await client.chat.completions.create(model="m", messages=ASK, n=3)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_takes_its_request_out_of_the_engine(stream: bool) -> None:
    engine = _Waiting()
    async with served(engine) as client:
        async with asyncio.TaskGroup() as group:
            if stream:
                answer: Any = await client.chat.completions.create(model="m", messages=ASK, n=2, stream=True)
                await engine.until(2)
                await answer.close()
            else:
                asked = group.create_task(client.chat.completions.create(model="m", messages=ASK, n=2))
                await engine.until(2)
                asked.cancel()
            await engine.until(0)
        async with ClientSession() as session, session.get(str(client.base_url)[:-4] + "/health") as health:
            assert (await health.json())["running"] == 0


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["auto", "user", "\ud800"]),
)
_json = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
_VALID: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s", "name": "n"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "t"}, *_image(_png(np.zeros((2, 3, 3), np.uint8)))[0]["content"]],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "r",
            "tool_calls": [{"id": "x", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "t"}]},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": TREE}}],
    "tool_choice": "auto",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 300,
    "temperature": 0.5,
    "seed": 1,
    "stop": ["yy", "zz"],
    "n": 2,
    "logprobs": True,
    "return_token_ids": True,
    "thinking": {"type": "enabled", "keep": "all"},
    "chat_template_kwargs": {"thinking": True},
}


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every value at any depth, as the container and the key under which it stands."""
    for key, below in enumerate(node) if isinstance(node, list) else node.items():
        yield node, key
        if isinstance(below, dict | list):
            yield from _places(below)


@st.composite
def _bodies(draw: st.DrawFn) -> Any:
    """A request in which a few values, at any depth, were replaced by others, removed or added."""
    body: Any = copy.deepcopy(_VALID)
    for _ in range(draw(st.integers(0, 3))):
        node, key = draw(st.sampled_from(list(_places(body))))
        match draw(st.integers(0, 3)):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[draw(st.sampled_from([*node, *TREE, "x"]))] = draw(_json)
            case _:
                node[key] = draw(_json)
    return body


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Callable[[bytes], tuple[int, str]]]:
    """Posts a body to one server that outlives the examples; gives status and text."""
    said = completion_text("abc", reasoning="r", calls=[("weather", {"city": 1}), ("other", {})])
    engine = ScriptedEngine(T, lambda prompt, role: said)

    async def post(url: str, body: bytes) -> tuple[int, str]:
        async with ClientSession() as session, session.post(url, data=body) as response:
            return response.status, await response.text()

    with asyncio.Runner() as runner:
        server = served(engine)
        client = runner.run(server.__aenter__())
        yield lambda body: runner.run(post(f"{client.base_url}chat/completions", body))
        runner.run(server.__aexit__(None, None, None))


@settings(max_examples=500)
@given(body=st.one_of(_bodies(), _bodies(), _json))
def test_no_json_at_all_breaks_the_server(fuzzed: Callable[[bytes], tuple[int, str]], body: Any) -> None:
    status, text = fuzzed(json.dumps(body).encode())
    assert status < 500, text
    assert "Traceback" not in text
    if status != 200:
        assert json.loads(text)["error"].keys() == {"message", "type", "param", "code"}
    elif text.startswith("data: "):
        assert text.endswith("data: [DONE]\n\n")
        assert "engine_failed" not in text
    event(str(status))


@given(data=st.binary(max_size=40))
def test_no_bytes_at_all_break_the_server(fuzzed: Callable[[bytes], tuple[int, str]], data: bytes) -> None:
    status, text = fuzzed(data)
    assert status == 400
    assert json.loads(text)["error"]["type"] == "invalid_request_error"
