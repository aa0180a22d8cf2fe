"""Answers from a chat endpoint: requests pass through. Where it tells its token ids (vLLM's return_token_ids), what it
says it read and drew is recorded; of any other endpoint the text alone, on which nothing can be trained."""

import re
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import orjson
from yarl import URL

from baltoro.chat.messages import TokenSequence
from baltoro.chat.parse import ArgumentsDelta, CallBegun, CallEnded, ContentDelta, Event, ReasoningDelta
from baltoro.rollout.gateway.answer import FinishReason, Job, Step
from baltoro.rollout.gateway.errors import ApiError
from baltoro.rollout.gateway.recent import Recent
from baltoro.rollout.gateway.rendering import Rendering
from baltoro.rollout.gateway.upstream import Ask
from baltoro.rollout.remote import events

_TOLD_BYTES = 2**28
# A key, never the text of a string: there the closing quote would have a backslash before it.
_PROMPT_IDS = re.compile(rb'"prompt_token_ids"\s*:\s*\[')


class Relay:
    """`url`: with its /v1. Nothing else is ever asked: redirects are not followed. `run` must be entered.
    tells_ids: that the endpoint knows return_token_ids."""

    def __init__(
        self, url: str, key: str, max_len: int, *, tells_ids: bool = True, rendering: Rendering | None = None
    ) -> None:
        self.exact = tells_ids
        self.rendering = rendering
        self.max_len = max_len
        self._url = URL(url.rstrip("/") + "/chat/completions")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._spelled: dict[int, bytes] = {}
        self._told = Recent[tuple[bytes, "array[int]"]](_TOLD_BYTES)

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        # aiohttp's own limit is 100 connections, and the rest would wait unseen.
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=jar) as self._http:
            yield

    async def prepare(self, ask: Ask) -> Job:
        """The prompt's ids are filled in when the upstream has told them."""
        if ask.request.n > 1:
            raise ApiError(400, "only one completion at once passes through", param="n")
        return Job(ask.request.model, TokenSequence(), array("i"), (), ask.setting.tools, ask.request.thinks, (), "any")

    def spell(self, token: int) -> bytes:
        return self._spelled[token]

    async def speak(self, ask: Ask, job: Job, index: int) -> AsyncGenerator[Step]:
        body = (
            dict(ask.body) if ask.dialect == "chat" else ask.request.model_dump(exclude_unset=True, exclude_none=True)
        )
        if self.exact:
            body |= {"return_token_ids": True, "logprobs": True}
        async with self._post(body) as response:
            if ask.request.stream:
                reader = _Reader(job)
                async for chunk in events(response.content):
                    if (step := reader.read(chunk)) is not None:
                        yield self._spelt(ask, chunk["choices"][0], step)
                yield reader.end()
            else:
                data = await response.read()
                whole = self._read(data, ask.session, job) if self.exact else orjson.loads(data)
                choice = whole["choices"][0]
                step = _step(choice, whole, _said(choice["message"]), told=self.exact)
                yield self._spelt(ask, choice, step)
                yield Step((), finish=_finish(choice["finish_reason"]))

    def _read(self, data: bytes, session: str, job: Job) -> dict[str, Any]:
        """The answer; the prompt's ids go to `job`. Those of a history are told in every answer again: what stands as
        it stood in the last one is compared, not parsed."""
        found = _PROMPT_IDS.search(data)
        if found is None:
            raise _untold("prompt_token_ids")
        begin, end = found.end(), data.find(b"]", found.end())
        whole = orjson.loads(data[:begin] + b"-1" + data[end:])
        if whole.get("prompt_token_ids") != [-1]:  # they stand elsewhere too
            whole = orjson.loads(data)
            job.read.extend(_ids(whole, "prompt_token_ids"))
            return whole
        text = data[begin:end]
        job.read.extend(_parsed(text, self._told.get(session)))
        if session:
            self._told.keep(session, (text, job.read), len(text) + 4 * len(job.read))
        return whole

    @asynccontextmanager
    async def _post(self, body: Mapping[str, Any]) -> AsyncGenerator[aiohttp.ClientResponse]:
        data = orjson.dumps(body)
        try:
            async with self._http.post(self._url, data=data, headers=self._headers, allow_redirects=False) as response:
                if response.status != 200:
                    raise await _refused(response)
                yield response
        except aiohttp.ClientConnectionError as error:
            raise ApiError(502, f"the upstream cannot be reached: {error}", code="upstream_failed") from None

    def _spelt(self, ask: Ask, choice: Mapping[str, Any], step: Step) -> Step:
        if ask.request.logprobs:
            for token, entry in zip(step.ids, choice["logprobs"]["content"], strict=True):
                known = entry.get("bytes")
                self._spelled[token] = entry["token"].encode() if known is None else bytes(known)
        return step


class _Reader:
    """Chunks of a stream to steps."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._called = -1
        self._finish: FinishReason = "stop"

    def read(self, chunk: Mapping[str, Any]) -> Step | None:
        if chunk.get("prompt_token_ids"):
            self._job.read.extend(chunk["prompt_token_ids"])
        if not chunk["choices"]:
            return None
        choice = chunk["choices"][0]
        if choice.get("finish_reason"):
            self._finish = _finish(choice["finish_reason"])
        events = list(_said({**choice["delta"], "tool_calls": None}))
        for call in choice["delta"].get("tool_calls") or ():
            if call["index"] != self._called:
                events += self._end_call()
                self._called = call["index"]
                events.append(CallBegun(call["id"], call["function"]["name"]))
            events.append(ArgumentsDelta(call["function"].get("arguments") or ""))
        told = bool(choice.get("token_ids"))
        return _step(choice, chunk, events, told=told) if told or events else None

    def end(self) -> Step:
        return Step(tuple(self._end_call()), finish=self._finish)

    def _end_call(self) -> list[Event]:
        return [CallEnded()] if self._called >= 0 else []


def _said(message: Mapping[str, Any]) -> list[Event]:
    events: list[Event] = []
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        events.append(ReasoningDelta(reasoning))
    if message.get("content"):
        events.append(ContentDelta(message["content"]))
    for call in message.get("tool_calls") or ():
        function = call["function"]
        events += [CallBegun(call["id"], function["name"]), ArgumentsDelta(function["arguments"]), CallEnded()]
    return events


def _step(choice: Mapping[str, Any], whole: Mapping[str, Any], events: Sequence[Event], *, told: bool) -> Step:
    """told: that the token ids stand there."""
    if not told:
        return Step(tuple(events))
    ids = _ids(choice, "token_ids")
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    if len(ids) != len(logprobs):
        raise ApiError(502, f"the upstream tells {len(ids)} token ids and {len(logprobs)} log-probabilities")
    return Step(tuple(events), ids, logprobs, int(whole.get("weight_version") or 0))


def _ids(holder: Mapping[str, Any], name: str) -> Sequence[int]:
    ids = holder.get(name)
    if ids is None:
        raise _untold(name)
    return ids


def _untold(name: str) -> ApiError:
    return ApiError(502, f"the upstream tells no {name}; it must know return_token_ids, as vLLM does", code="no_ids")


def _parsed(text: bytes, last: "tuple[bytes, array[int]] | None") -> "array[int]":
    """The ids in `text`, numbers with commas between; those that stood in the `last` text are taken from there."""
    known = array("i")
    at = 0
    if last is not None:
        size = min(len(text), len(last[0]))
        new = np.frombuffer(text, np.uint8)
        differ = new[:size] != np.frombuffer(last[0], np.uint8)[:size]
        alike = int(differ.argmax()) if differ.any() else size
        at = text.rfind(b",", 0, alike) + 1
        known = last[1][: int(np.count_nonzero(new[:at] == ord(",")))]
    return known + array("i", orjson.loads(b"[" + text[at:] + b"]"))


def _finish(reason: str) -> FinishReason:
    reasons: dict[str, FinishReason] = {"length": "length", "tool_calls": "tool_calls"}
    return reasons.get(reason, "stop")


async def _refused(response: aiohttp.ClientResponse) -> ApiError:
    """4xx are the client's mistakes, told in the upstream's words; whatever else is the upstream's fault."""
    text = (await response.content.read(10_000)).decode("utf-8", "replace")
    if response.status == 429:
        after = response.headers.get("Retry-After", "1")
        return ApiError(429, "the upstream is overloaded", retry_after_s=int(after) if after.isdecimal() else 1)
    if 400 <= response.status < 500 and response.status not in (401, 403):
        return ApiError(response.status, text)
    return ApiError(502, f"the upstream answered {response.status}", code="upstream_failed")
