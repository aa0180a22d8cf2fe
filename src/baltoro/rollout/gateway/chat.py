"""OpenAI's chat completions."""

import time
from collections.abc import Sequence
from typing import Any

from baltoro.chat.parse import ArgumentsDelta, CallBegun, CallEnded, ContentDelta, Event, Malformed, ReasoningDelta
from baltoro.rollout.gateway.answer import Choice, Job, Step
from baltoro.rollout.gateway.chat_request import ChatRequest
from baltoro.rollout.gateway.dialect import Spell, event, fresh
from baltoro.rollout.gateway.errors import ApiError, validated


class Chat:
    name = "chat"

    def read(self, body: dict[str, Any]) -> ChatRequest:
        return validated(ChatRequest, body)

    def whole(self, request: ChatRequest, job: Job, choices: Sequence[Choice], spell: Spell) -> dict[str, Any]:
        body = {
            **_head(job, "chat.completion"),
            "choices": [_whole(request, choice, spell) for choice in choices],
            "usage": _usage(job, choices),
        }
        return {**body, "prompt_token_ids": job.read.tolist()} if request.return_token_ids else body

    def stream(self, request: ChatRequest, job: Job, spell: Spell) -> "ChatStream":
        return ChatStream(request, job, spell)

    def error(self, error: ApiError) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if error.status >= 500 else kinds.get(error.status, "invalid_request_error")
        return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


class ChatStream:
    def __init__(self, request: ChatRequest, job: Job, spell: Spell) -> None:
        self._request = request
        self._job = job
        self._spell = spell
        self._head = _head(job, "chat.completion.chunk")
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        if self._usage:
            self._head["usage"] = None
        self._calls: dict[int, int] = {}

    def step(self, choice: Choice, step: Step) -> bytes:
        """Empty where a step has nothing to tell yet."""
        opening = b""
        if choice.index not in self._calls:
            self._calls[choice.index] = 0
            delta = {"role": "assistant", "content": ""}
            first = {"index": choice.index, "delta": delta, "finish_reason": None}
            ids = {"prompt_token_ids": self._job.read.tolist()} if self._request.return_token_ids else {}
            opening = event({**self._head, "choices": [first], **ids})
        delta = self._delta(choice, step)
        described = _described(self._request, step.ids, step.logprobs, self._spell) if step.ids else {}
        if not (delta or described or step.finish):
            return opening
        chunk = {"index": choice.index, "delta": delta, "finish_reason": step.finish, **described}
        return opening + event({**self._head, "choices": [chunk]})

    def end(self, choices: Sequence[Choice]) -> bytes:
        usage = event({**self._head, "choices": [], "usage": _usage(self._job, choices)}) if self._usage else b""
        return usage + b"data: [DONE]\n\n"

    def error(self, body: dict[str, Any]) -> bytes:
        return event(body)

    def _delta(self, choice: Choice, step: Step) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        for one in step.events:
            self._extend(delta, choice.index, one)
        if step.finish and (errors := choice.errors()):
            delta["parse_errors"] = errors
        return delta

    def _extend(self, delta: dict[str, Any], index: int, event: Event) -> None:
        def call(function: dict[str, str], **head: str) -> None:
            calls = delta.setdefault("tool_calls", [])
            calls.append({"index": self._calls[index] - 1, **head, "function": function})

        match event:
            case ReasoningDelta(text):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + text
            case ContentDelta(text):
                delta["content"] = delta.get("content", "") + text
            case CallBegun(call_id, name):
                self._calls[index] += 1
                call({"name": name, "arguments": ""}, id=call_id, type="function")
            case ArgumentsDelta(text):
                call({"arguments": text})
            case CallEnded() | Malformed():
                pass


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{fresh()}", "object": kind, "created": int(time.time()), "model": job.model}


def _usage(job: Job, choices: Sequence[Choice]) -> dict[str, int]:
    prompt, completion = len(job.read), sum(len(choice.drawn.ids) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _whole(request: ChatRequest, choice: Choice, spell: Spell) -> dict[str, Any]:
    said = choice.message
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
    if choice.job.thinking:
        message["reasoning_content"] = said.reasoning
    if said.tool_calls:
        message["content"] = said.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.tool_calls
        ]
    if errors := choice.errors():
        message["parse_errors"] = errors
    described = {"logprobs": None, **_described(request, choice.drawn.ids, choice.drawn.logprobs, spell)}
    return {"index": choice.index, "message": message, "finish_reason": choice.finish, **described}


def _described(request: ChatRequest, ids: Sequence[int], logprobs: Sequence[float], spell: Spell) -> dict[str, Any]:
    """One entry for each token that was drawn, control tokens by name."""
    fields: dict[str, Any] = {}
    if request.logprobs:
        entries = [
            {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece), "top_logprobs": []}
            for piece, logprob in zip(map(spell, ids), logprobs, strict=True)
        ]
        fields["logprobs"] = {"content": entries, "refusal": None}
    if request.return_token_ids:
        fields["token_ids"] = list(ids)
    return fields
