"""An OpenAI-compatible server on a streaming engine: /v1/chat/completions, /v1/models, /health.

A request lives as long as its connection: when the client leaves, its handler is cancelled and the engine drops the
work. The engine computes on this event loop, so whatever takes long here is done in threads.
"""

import asyncio
import hmac
import json
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from baltoro.agent.engine import Sampling, StreamingEngine
from baltoro.agent.loop import derive_seed
from baltoro.chat.media import MediaSpec
from baltoro.chat.render import TooLong, render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.completion import Choice, Job, Step, speak
from baltoro.rollout.gateway.dialogue import read_messages, read_tools
from baltoro.rollout.gateway.protocol import ApiError, ChatRequest, read_request

_log = logging.getLogger(__name__)
_PREPARED_AT_ONCE = 2
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ApiConfig:
    """`name`: of the model. `max_len`: tokens of prompt and completion together. `max_choices`: completions at once,
    those that wait for the engine included; more are answered with 429. `max_body`: bytes. An empty `api_key` asks for
    none."""

    name: str
    max_len: int
    max_choices: int
    max_body: int
    api_key: str = ""


class Api:
    """Answers requests with `engine`, which must be running, in the role named by `config.name`."""

    def __init__(self, engine: StreamingEngine, tokenizer: Tokenizer, media: MediaSpec, config: ApiConfig) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._media = media
        self._config = config
        self._created = int(time.time())
        self._choices = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._preparing = asyncio.Semaphore(_PREPARED_AT_ONCE)

    def runner(self) -> web.AppRunner:
        """Cancels the handler whose client leaves."""
        app = web.Application(middlewares=[self._guard], client_max_size=self._config.max_body)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/models/{name:.+}", self._one_model)
        app.router.add_post("/v1/chat/completions", self._complete)
        return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when the running ones are answered."""
        self._draining = True
        await self._idle.wait()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """The boundary at which every failure becomes an answer in OpenAI's form."""
        try:
            self._authorise(request)
            return await handler(request)
        except ApiError as error:
            return _refusal(error)
        except web.HTTPRequestEntityTooLarge:
            limit = self._config.max_body
            return _refusal(ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large"))
        except web.HTTPException as error:
            refusal = _refusal(ApiError(error.status, f"{request.method} {request.path}: {error.reason}"))
            if "Allow" in error.headers:
                refusal.headers["Allow"] = error.headers["Allow"]
            return refusal
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _refusal(_failed())

    def _authorise(self, request: web.Request) -> None:
        key = self._config.api_key
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key and request.path != "/health" and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _health(self, request: web.Request) -> web.Response:
        if self._draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return web.json_response({"status": "ok", "running": self._choices})

    async def _list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def _one_model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["name"])
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        config = self._config
        return {
            "id": config.name,
            "object": "model",
            "created": self._created,
            "owned_by": "baltoro",
            "max_model_len": config.max_len,
        }

    def _check_model(self, name: str) -> None:
        if name != self._config.name:
            fault = f"there is no model {name}; this server has {self._config.name}"
            raise ApiError(404, fault, code="model_not_found", param="model")

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        if self._draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        with self._counted() as count:
            count(1)
            request = await asyncio.to_thread(read_request, await http.read())
            self._check_model(request.model)
            count(request.n - 1)
            async with self._preparing:
                job = await asyncio.to_thread(self._prepare, request)
            if request.stream:
                return await self._stream(http, request, job)
            return await self._answer(request, job)

    @contextmanager
    def _counted(self) -> Generator[Callable[[int], None]]:
        """Gives a function that admits so many completions more, until the end of the block."""
        held = 0

        def count(more: int) -> None:
            nonlocal held
            if self._choices + more > self._config.max_choices:
                fault = f"{self._choices} completions are running, of at most {self._config.max_choices}; try again"
                raise ApiError(429, fault, code="rate_limit_exceeded")
            held += more
            self._choices += more
            self._idle.clear()

        try:
            yield count
        finally:
            self._choices -= held
            if not self._choices:
                self._idle.set()

    def _prepare(self, request: ChatRequest) -> Job:
        """Runs in a thread: decodes pictures and videos, and encodes."""
        limit = self._config.max_len
        tools = read_tools(request.tools)
        messages = read_messages(request)
        try:
            prompt = render(
                messages,
                self._tokenizer,
                self._media,
                tools if request.tool_choice == "auto" else (),
                add_generation_prompt=True,
                keep_reasoning=request.keeps_reasoning,
                thinking=request.thinks,
                max_tokens=limit - 1,
            )
        except TooLong:
            raise _too_long(f"the messages take more than {limit - 1} tokens", limit) from None
        except (ValueError, RecursionError) as error:  # a schema without a TypeScript form; a broken video
            fault = "a schema is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ApiError(400, fault) from None
        max_tokens = request.max_completion_tokens or request.max_tokens or limit - len(prompt.ids)
        if len(prompt.ids) + max_tokens > limit:
            raise _too_long(f"the messages take {len(prompt.ids)} tokens and the completion up to {max_tokens}", limit)
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
        calls = "none" if request.tool_choice == "none" else "any" if request.parallel_tool_calls else "one"
        return Job(
            prompt,
            [
                Sampling(max_tokens, request.temperature, request.top_p, derive_seed(seed, i) if i else seed)
                for i in range(request.n)
            ],
            tools,
            request.thinks,
            request.stops,
            calls,
            request.logprobs,
            request.return_token_ids,
        )

    async def _speak(self, job: Job, on_step: Callable[[Choice, Step], Awaitable[None]]) -> list[Choice]:
        """All choices of a request at the same time; each step is handed to `on_step` before the next."""
        choices = [Choice(job, self._tokenizer, index) for index in range(len(job.samplings))]

        async def one(choice: Choice) -> None:
            steps = speak(self._engine, job, self._tokenizer, choice.index, self._config.name)
            async with aclosing(steps):
                async for step in steps:
                    await on_step(choice, step)

        async with asyncio.TaskGroup() as group:
            for choice in choices:
                group.create_task(one(choice))
        return choices

    async def _answer(self, request: ChatRequest, job: Job) -> web.Response:
        async def add(choice: Choice, step: Step) -> None:
            choice.add(step)

        choices = await self._speak(job, add)
        body = {
            **_head(request, "chat.completion"),
            "choices": [choice.whole() for choice in choices],
            "usage": _usage(job, choices),
        }
        if job.token_ids:
            body["prompt_token_ids"] = job.prompt.ids
        return web.json_response(body)

    async def _stream(self, http: web.Request, request: ChatRequest, job: Job) -> web.StreamResponse:
        """Server-sent events. The status waits for the first token, so that an engine that fails at once is a 500."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        head = _head(request, "chat.completion.chunk")
        usage = request.stream_options is not None and request.stream_options.include_usage
        if usage:
            head["usage"] = None
        turn = asyncio.Lock()  # the choices of one request write to one connection

        async def send(body: dict[str, Any]) -> None:
            async with turn:
                if not response.prepared:
                    await response.prepare(http)
                await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")

        async def write(choice: Choice, step: Step) -> None:
            if not choice.opened:
                ids = {"prompt_token_ids": job.prompt.ids} if job.token_ids else {}
                await send({**head, "choices": [choice.opening()], **ids})
            chunk = choice.chunk(step)
            if chunk is not None:
                await send({**head, "choices": [chunk]})

        try:
            choices = await self._speak(job, write)
            if usage:
                await send({**head, "choices": [], "usage": _usage(job, choices)})
        except Exception:
            if http.transport is None:  # the client left
                return response
            if not response.prepared:
                raise
            _log.exception("%s failed in the middle of a stream", http.path)
            await send(_failed().body)
            return response
        await response.write(b"data: [DONE]\n\n")
        return response


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
    }


def _usage(job: Job, choices: Sequence[Choice]) -> dict[str, int]:
    prompt, completion = len(job.prompt.ids), sum(len(choice.sampled) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _too_long(fault: str, limit: int) -> ApiError:
    fault = f"{fault}; this model's context is {limit} tokens"
    return ApiError(400, fault, code="context_length_exceeded", param="messages")


def _failed() -> ApiError:
    return ApiError(500, "the engine failed; the server's log says why", code="engine_failed")


def _refusal(error: ApiError) -> web.Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return web.json_response(error.body, status=error.status, headers=headers)


async def serve(api: Api, running: AbstractAsyncContextManager[None], host: str, port: int) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains; a second signal ends at once. `running`: while it is entered, the
    engine works. Raises what ends the engine, after every request that waited for it was answered with 500."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    runner = api.runner()
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ValueError(f"{error.strerror}; choose another host= or port=") from None
        for number in signals:
            loop.add_signal_handler(number, on_signal)
        shown = f"[{host}]" if ":" in host else host
        async with running:
            print(f"listening on http://{shown}:{runner.addresses[0][1]}/v1", flush=True)
            await stop.wait()
            await api.drain()
    finally:
        await runner.cleanup()
