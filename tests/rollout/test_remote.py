"""Engines over HTTP, against real servers that speak the interfaces of vLLM and SGLang."""

import asyncio
import contextlib
import json
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from baltoro.agent.engine import Overloaded, Sampling
from baltoro.chat.decode import decode_image
from baltoro.chat.media import MediaSpec, preprocess_image
from baltoro.chat.messages import Image, TokenSequence
from baltoro.rollout.remote import SglangEngine, VllmEngine, data_url

HALF = (0.5, 0.5, 0.5)
SPEC = MediaSpec(patch_size=4, merge=2, patch_limit=256, side_limit=64, mean=HALF, std=HALF, frames_per_chunk=4)
PAD = 99
DRAWN = [(5, -0.25), (6, -0.5), (7, -1.5)]
SAMPLING = Sampling(max_tokens=3, temperature=0.7, top_p=0.9, seed=11)
Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def server(
    path: str, answer: Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await answer(request, await request.json())

    app = web.Application(client_max_size=2**26)
    app.router.add_post(path, handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def told(request: web.Request, events: list[Any], done: bool = True) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        # In halves, so that events do not end where packets end.
        data = f"data: {json.dumps(event)}\n\n".encode()
        await response.write(data[:7])
        await response.write(data[7:])
    if done:
        await response.write(b"data: [DONE]\n\n")
    return response


def choice(drawn: list[tuple[int, float]], finish: str | None) -> dict[str, Any]:
    ids, logprobs = [token for token, _ in drawn], [logprob for _, logprob in drawn]
    return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish, "text": "?"}


async def test_vllm_reads_ids_and_tells_ids() -> None:
    asked: list[dict[str, Any]] = []

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked.append(body)
        if body.get("stream"):
            parts = [choice(DRAWN[:1], None), choice(DRAWN[1:], "stop")]
            return await told(request, [*({"choices": [part]} for part in parts), {"choices": []}])
        return web.json_response({"choices": [choice(DRAWN, "length")]})

    async with server("/v1/completions", answer) as url:
        engine = VllmEngine(url, "kimi", version=lambda: 4)
        async with engine.run():
            whole = await engine.generate(TokenSequence([1, 2, 3]), SAMPLING, "agent")
            streamed = [sampled async for sampled in engine.stream(TokenSequence([1, 2, 3]), SAMPLING, "agent")]
            with pytest.raises(ValueError, match="takes no media"):
                item = preprocess_image(Image(np.zeros((8, 8, 3), np.uint8)), SPEC)
                await engine.generate(TokenSequence([1, PAD], [item]), SAMPLING, "agent")
    assert list(zip(whole.ids, whole.logprobs, strict=True)) == DRAWN
    assert (whole.finish_reason, whole.weight_version) == ("length", 4)
    assert [tuple(sampled) for sampled in streamed] == [(*drawn, 4) for drawn in DRAWN]
    assert [body["prompt"] for body in asked] == [[1, 2, 3]] * 2
    fields = {"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "seed": 11, "return_token_ids": True}
    assert fields.items() <= asked[0].items()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_the_picture_that_goes_along_has_the_pixels_that_were_preprocessed(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    item = preprocess_image(Image(pixels), SPEC)
    sent = decode_image(b64decode(data_url(item, SPEC).partition(",")[2]))
    assert np.array_equal(sent.pixels[:height, :width], pixels)
    again = preprocess_image(sent, SPEC)
    assert again.grid_thw == item.grid_thw
    assert np.array_equal(again.patches, item.patches)


async def test_sglang_gets_pictures_and_must_have_read_our_tokens() -> None:
    items = [preprocess_image(Image(np.full((16, 8 * n, 3), 40 * n, np.uint8)), SPEC) for n in (1, 2)]
    # 16 pixels are two cells high: 2 and 4 tokens.
    prompt = TokenSequence([1, PAD, PAD, 2, PAD, PAD, PAD, PAD, 3], items)
    asked: list[dict[str, Any]] = []
    read = 9

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked.append(body)
        entries = [[logprob, token, None] for token, logprob in DRAWN]
        meta = {"prompt_tokens": read, "weight_version": "12", "finish_reason": {"type": "stop"}}
        if body.get("stream"):
            return await told(request, [{"meta_info": {**meta, "output_token_logprobs": entries[:n]}} for n in (1, 3)])
        return web.json_response({"meta_info": {**meta, "output_token_logprobs": entries}})

    async with server("/generate", answer) as url:
        engine = SglangEngine(url, SPEC, PAD)
        async with engine.run():
            whole = await engine.generate(prompt, SAMPLING, "agent")
            streamed = [sampled async for sampled in engine.stream(prompt, SAMPLING, "agent")]
            read = 8
            with pytest.raises(ValueError, match="read 8 tokens where 9 were sent"):
                await engine.generate(prompt, SAMPLING, "agent")
    assert list(zip(whole.ids, whole.logprobs, strict=True)) == DRAWN
    assert (whole.finish_reason, whole.weight_version) == ("stop", 12)
    assert [tuple(sampled) for sampled in streamed] == [(*drawn, 12) for drawn in DRAWN]
    assert asked[0]["input_ids"] == [1, PAD, 2, PAD, 3]
    assert [url.partition(",")[0] for url in asked[0]["image_data"]] == ["data:image/png;base64"] * 2
    assert asked[0]["logprob_start_len"] == -1


@pytest.mark.parametrize(
    ("status", "error"),
    [(429, Overloaded), (503, Overloaded), (500, ConnectionError), (400, ValueError), (302, ValueError)],
)
async def test_refusals_are_told_apart(status: int, error: type[Exception]) -> None:
    """A redirect is a refusal: the key goes to one address alone."""
    asked = 0

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return web.Response(status=status, headers={"Retry-After": "7", "Location": "/v1/completions"})

    async with server("/v1/completions", answer) as url:
        engine = VllmEngine(url, "m", key="secret")
        async with engine.run():
            with pytest.raises(error) as refused:
                await engine.generate(TokenSequence([1]), SAMPLING, "agent")
    assert asked == 1
    if isinstance(refused.value, Overloaded):
        assert refused.value.retry_after_s == 7


async def test_what_breaks_on_the_way_is_a_connection_error() -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await told(request, [{"choices": [choice(DRAWN[:1], None)]}], done=False)

    async with server("/v1/completions", answer) as url:
        engine = VllmEngine(url, "m")
        async with engine.run():
            with pytest.raises(ConnectionError, match="cut off"):
                _ = [sampled async for sampled in engine.stream(TokenSequence([1]), SAMPLING, "agent")]
    engine = VllmEngine(url, "m")
    async with engine.run():
        with pytest.raises(ConnectionError):
            await engine.generate(TokenSequence([1]), SAMPLING, "agent")


async def test_three_hundred_calls_are_on_the_way_at_once() -> None:
    """aiohttp's own limit would hold 200 of them back, and nobody would ever be answered."""
    inside = 0
    all_in = asyncio.Event()

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal inside
        inside += 1
        if inside == 300:
            all_in.set()
        await all_in.wait()
        return web.json_response({"choices": [choice(DRAWN, "stop")]})

    async with server("/v1/completions", answer) as url:
        engine = VllmEngine(url, "m")
        async with engine.run(), asyncio.timeout(30), asyncio.TaskGroup() as group:
            for _ in range(300):
                group.create_task(engine.generate(TokenSequence([1]), SAMPLING, "agent"))
