"""`baltoro gateway` as a process, in front of an endpoint that tells its token ids, and of one that does not."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import ClientSession, web
from openai import AsyncOpenAI

from baltoro import cli

SOURCE = str(Path(__file__).parents[3] / "src")
ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@contextlib.asynccontextmanager
async def upstream(asked: list[Any], tells_ids: bool) -> AsyncIterator[str]:
    """Answers n, says that it read the tokens 1, 2, .. of all messages, and that it drew 100 + n."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked.append((body, request.headers.get("Authorization")))
        n = len(asked)
        prompt = list(range(1, 3 * len(body["messages"])))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if tells_ids and body.get("return_token_ids"):
            entry = {"token": "x", "logprob": -0.5 * n, "bytes": [120]}
            choice |= {"token_ids": [100 + n], "logprobs": {"content": [entry]}}
        extra = {"prompt_token_ids": prompt} if tells_ids else {}
        if not body.get("stream"):
            choice["message"] = {"role": "assistant", "content": str(n), "reasoning_content": "why"}
            return web.json_response({"choices": [choice], **extra})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in (
            {"choices": [{"index": 0, "delta": {"role": "assistant", "reasoning_content": "why"}}], **extra},
            {"choices": [{**choice, "delta": {"content": str(n)}}]},
        ):
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


@contextlib.asynccontextmanager
async def command(*words: str, **environment: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baltoro.cli", "gateway", *words, "model=m", "port=0"),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE, **environment},
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    try:
        yield line.removeprefix("listening on ").strip().removesuffix("/v1"), process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_what_passes_through_is_kept_with_the_ids_that_the_upstream_tells(tmp_path: Path, stream: bool) -> None:
    asked: list[Any] = []
    keys = {"BALTORO_API_KEY": "a,b", "BALTORO_ADMIN_KEY": "boss", "BALTORO_UPSTREAM_KEY": "theirs"}
    async with (
        upstream(asked, tells_ids=True) as up,
        command(str(tmp_path / "calls.db"), f"upstream={up}", **keys) as (url, _),
        AsyncOpenAI(base_url=f"{url}/sessions/s/v1", api_key="b", max_retries=0) as client,
        ClientSession(url, headers={"Authorization": "Bearer boss"}) as http,
    ):
        for ask in (
            ASK,
            {**ASK, "messages": [*ASK["messages"], {"role": "assistant", "content": "1"}, *ASK["messages"]]},
        ):
            answer: Any = await client.chat.completions.create(**ask, stream=stream)
            if stream:
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
            else:
                text = answer.choices[0].message.content
            assert text == str(len(asked))
        async with http.get("/sessions/s") as response:
            calls = (await response.json())["calls"]
    assert {key for _, key in asked} == {"Bearer theirs"}
    # The second prompt, as the upstream told it, does not hold what was drawn at first: it was tokenised anew.
    assert [call["prompt_ids_added"] for call in calls] == [[1, 2], list(range(1, 9))]
    assert [(call["completion_ids"], call["logprobs"]) for call in calls] == [([101], [-0.5]), ([102], [-1.0])]
    assert calls[1]["parent"] is None
    assert calls[1]["broke"] == "the history was tokenised anew: behind token 2 it differs from what was recorded"


async def test_of_other_endpoints_the_text_is_kept(tmp_path: Path) -> None:
    asked: list[Any] = []
    async with (
        upstream(asked, tells_ids=False) as up,
        command(str(tmp_path / "calls.db"), f"upstream={up}", "kind=text", BALTORO_ADMIN_KEY="boss") as (url, _),
        AsyncOpenAI(base_url=f"{url}/sessions/s/v1", api_key="x", max_retries=0) as client,
        ClientSession(url, headers={"Authorization": "Bearer boss"}) as http,
    ):
        answer = await client.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == "1"
        model: Any = await client.models.retrieve("m")
        assert model.records == "text"
        async with http.get("/sessions/s") as response:
            (call,) = (await response.json())["calls"]
    assert asked[0][0] == ASK
    assert (call["answer"][1], call["completion_ids"]) == (["1"], [])


async def test_an_upstream_that_tells_no_ids_is_named_as_the_fault(tmp_path: Path) -> None:
    async with (
        upstream([], tells_ids=False) as up,
        command(str(tmp_path / "calls.db"), f"upstream={up}") as (url, _),
        AsyncOpenAI(base_url=f"{url}/sessions/s/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="tells no prompt_token_ids"):
            await client.chat.completions.create(**ASK)


async def test_the_lag_of_the_loop_is_told(tmp_path: Path) -> None:
    """It watches from the beginning: a timer is never exactly on time."""
    async with (
        command(str(tmp_path / "calls.db"), "upstream=http://127.0.0.1:9/v1") as (url, _),
        ClientSession(url) as http,
    ):
        lag, lines = {"p50": 0.0, "p99": 0.0}, list[str]()
        while not all(lag.values()):
            async with http.get("/metrics") as response:
                lines = (await response.text()).splitlines()
            told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            lag = {q: float(told[f"baltoro_gateway_loop_lag_{q}_seconds"]) for q in lag}
        assert 0 < lag["p50"] <= lag["p99"]
        assert not any("_engine_" in line for line in lines)


async def test_an_upstream_that_is_not_there_is_a_502(tmp_path: Path) -> None:
    async with (
        command(str(tmp_path / "calls.db"), "upstream=http://127.0.0.1:9/v1") as (url, _),
        AsyncOpenAI(base_url=f"{url}/sessions/s/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="cannot be reached") as refused:
            await client.chat.completions.create(**ASK)
    assert refused.value.status_code == 502


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=m"], "key upstream is missing"),
        (["upstream=http://x/v1", "model=m", "host=0.0.0.0"], "set BALTORO_API_KEY"),
        (["upstream=http://x", "model=m", "kind=vllm"], "give the model's tiktoken file as tokenizer="),
        (["upstream=http://x", "model=m", "kind=openai"], "choose one of 'chat', 'text', 'vllm', 'sglang'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert cli.main(["gateway", str(tmp_path / "calls.db"), *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
