"""Engines on other machines: ids go out over HTTP, ids with log-probabilities come back.

vLLM and SGLang read ids; an endpoint that reads only messages is no engine (its answers can be recorded through
`gateway.relay`). Written against their published interfaces and tested on servers that speak them, not on theirs.
"""

import base64
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image as PilImage

from baltoro.agent.engine import Completion, Overloaded, Sampled, Sampling
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.chat.tokenizer import Tokenizer

# The environment variable with the key of a server that somebody else runs.
UPSTREAM_KEY = "BALTORO_UPSTREAM_KEY"


class _Server:
    """Posts JSON to one address alone: redirects are not followed. `run` must be entered."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        # aiohttp's own limit is 100 connections, and the rest would wait unseen.
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as self._http:
            yield

    async def reach(self) -> None:
        """Raises ConnectionError where nobody listens; any answer will do."""
        try:
            async with self._http.get(self._url + "/health", headers=self._headers, allow_redirects=False):
                pass
        except aiohttp.ClientError as error:
            raise ConnectionError(
                f"{self._url} cannot be reached ({error}); start the server or correct its URL"
            ) from error

    async def _whole(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        async with self._post(path, body) as response:
            return orjson.loads(await response.read())

    @asynccontextmanager
    async def _post(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Raises Overloaded, ConnectionError, and ValueError for what the server will never take."""
        data = orjson.dumps(body)
        try:
            async with self._http.post(
                self._url + path, data=data, headers=self._headers, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise await _refused(response)
                yield response
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{self._url}: {error}") from error


class VllmEngine(_Server):
    """vLLM's /v1/completions with return_token_ids; `url` without /v1. Text alone: media cannot go along with ids.

    The version of the weights is what `version` says when an answer begins; vLLM does not tell it."""

    def __init__(self, url: str, model: str, key: str = "", *, version: Callable[[], int] = lambda: 0) -> None:
        super().__init__(url, key)
        self._model = model
        self._version = version

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        version = self._version()
        choice = (await self._whole("/v1/completions", self._body(prompt, sampling)))["choices"][0]
        ids, logprobs = _drawn(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        return Completion(ids, logprobs, _reason(choice["finish_reason"]), version)

    async def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        version = self._version()
        async with self._post("/v1/completions", {**self._body(prompt, sampling), "stream": True}) as response:
            async for chunk in events(response.content):
                for choice in chunk["choices"]:
                    if choice.get("token_ids"):
                        for token, logprob in zip(
                            *_drawn(choice["token_ids"], choice["logprobs"]["token_logprobs"]), strict=True
                        ):
                            yield Sampled(token, logprob, version)

    def _body(self, prompt: TokenSequence, sampling: Sampling) -> dict[str, Any]:
        if prompt.media:
            raise ValueError("vLLM takes no media beside token ids; pass such dialogues through the gateway's relay")
        return {
            "model": self._model,
            "prompt": prompt.ids,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }


class SglangEngine(_Server):
    """SGLang's /generate. Pictures go along as PNG files of exactly the pixels that the gateway's own preprocessing
    gave, one placeholder each, which the server expands; the number of tokens it then read must be ours."""

    def __init__(self, url: str, spec: MediaSpec, media_pad: int, key: str = "") -> None:
        super().__init__(url, key)
        self._spec = spec
        self._media_pad = media_pad

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        told = (await self._whole("/generate", self._body(prompt, sampling)))["meta_info"]
        self._check(prompt, told)
        ids, logprobs = _pairs(told["output_token_logprobs"])
        return Completion(ids, logprobs, _reason(told["finish_reason"]["type"]), _version(told))

    async def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        """The server tells, in every event, all tokens so far."""
        given = 0
        async with self._post("/generate", {**self._body(prompt, sampling), "stream": True}) as response:
            async for chunk in events(response.content):
                told = chunk["meta_info"]
                self._check(prompt, told)
                ids, logprobs = _pairs(told["output_token_logprobs"][given:])
                given += len(ids)
                for token, logprob in zip(ids, logprobs, strict=True):
                    yield Sampled(token, logprob, _version(told))

    def _body(self, prompt: TokenSequence, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "input_ids": prompt.ids,
            "sampling_params": {
                "max_new_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "sampling_seed": sampling.seed,
                "skip_special_tokens": False,
            },
            "return_logprob": True,
            # From the end of the prompt on: log-probabilities of the prompt would turn prefix caching off.
            "logprob_start_len": -1,
        }
        if prompt.media:
            body["input_ids"] = list(_folded(prompt.ids, self._media_pad))
            body["image_data"] = [data_url(item, self._spec) for item in prompt.media]
        return body

    def _check(self, prompt: TokenSequence, told: Mapping[str, Any]) -> None:
        if told["prompt_tokens"] != len(prompt.ids):
            raise ValueError(
                f"the server read {told['prompt_tokens']} tokens where {len(prompt.ids)} were sent; "
                "start it with the image limits of this run"
            )


def remote_engine(
    kind: Literal["vllm", "sglang"], url: str, model: str, tokenizer: Path | None, key: str
) -> tuple[VllmEngine | SglangEngine, Tokenizer]:
    """`tokenizer`: the model's tiktoken file. Raises ValueError where it is missing or broken, OSError."""
    if tokenizer is None:
        raise ValueError(f"kind={kind} reads token ids; give the model's tiktoken file as tokenizer=")
    known = Tokenizer.load(tokenizer)
    if kind == "vllm":
        return VllmEngine(url, model, key), known
    return SglangEngine(url, MediaSpec.K25, known.media_pad, key), known


def data_url(item: MediaItem, spec: MediaSpec) -> str:
    """The picture behind the patches, as a PNG file: pixels are whole numbers, so nothing is lost."""
    t, h, w = item.grid_thw
    if t != 1:
        raise ValueError("a video cannot go along with token ids; send its frames as pictures")
    p = spec.patch_size
    scaled = (item.patches * np.array(spec.std, np.float32)[:, None, None]) + np.array(spec.mean, np.float32)[
        :, None, None
    ]
    pixels: NDArray[np.uint8] = np.rint(scaled * 255).astype(np.uint8)
    pixels = pixels.reshape(h, w, 3, p, p).transpose(0, 3, 1, 4, 2).reshape(h * p, w * p, 3)
    file = io.BytesIO()
    PilImage.fromarray(pixels).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def events(stream: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The bodies of server-sent events up to [DONE]. Raises ConnectionError for a stream that ends without it."""
    rest = b""
    async for data in stream.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                body = line[5:].strip()
                if body == b"[DONE]":
                    return
                yield orjson.loads(body)
    raise ConnectionError("the stream was cut off before its end")


def _folded(ids: Iterable[int], pad: int) -> Iterable[int]:
    """One placeholder for each run of them: two pictures never touch, markers stand between."""
    before = None
    for token in ids:
        if token != pad or before != pad:
            yield token
        before = token


def _drawn(ids: Sequence[int], logprobs: Sequence[float]) -> tuple[list[int], list[float]]:
    if len(ids) != len(logprobs):
        raise ValueError(f"the server told {len(ids)} tokens and {len(logprobs)} log-probabilities")
    return list(ids), list(logprobs)


def _pairs(entries: Sequence[Sequence[Any]]) -> tuple[list[int], list[float]]:
    """SGLang's (log-probability, token, text)."""
    return [entry[1] for entry in entries], [entry[0] for entry in entries]


def _reason(told: str) -> Literal["stop", "length"]:
    if told == "abort":
        raise ConnectionError("the server aborted the request")
    return "length" if told == "length" else "stop"


def _version(told: Mapping[str, Any]) -> int:
    """SGLang names weight versions by any text; numbers are kept."""
    named = str(told.get("weight_version", "0"))
    return int(named) if named.isdecimal() else 0


async def _refused(response: aiohttp.ClientResponse) -> Exception:
    text = (await response.content.read(2000)).decode("utf-8", "replace")
    if response.status in (429, 503):
        after = response.headers.get("Retry-After", "0")
        return Overloaded(float(after) if after.isdecimal() else 0.0)
    if response.status >= 500 or response.status in (408, 409):
        return ConnectionError(f"the server answered {response.status}: {text}")
    return ValueError(f"the server answered {response.status}: {text}")
