"""The gateway over HTTP: chat completions on a streaming engine, and sessions that record them.

`/v1/...` answers and records nothing; `/sessions/{id}/v1/...` answers alike and records every call. A request lives as
long as its connection: when the client leaves, its handler is cancelled and the engine drops the work. The engine may
compute on this event loop, so whatever takes long here is done in threads.
"""

import asyncio
import hmac
import logging
import re
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
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence
from baltoro.chat.render import TooLong
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.answer import Choice, Job, Step, speak
from baltoro.rollout.gateway.anthropic import Anthropic
from baltoro.rollout.gateway.chat import Chat
from baltoro.rollout.gateway.chat_request import ChatRequest
from baltoro.rollout.gateway.dialect import Dialect
from baltoro.rollout.gateway.dialogue import Dialogue, media_fault, read_dialogue, read_tools
from baltoro.rollout.gateway.errors import ApiError, read_object
from baltoro.rollout.gateway.graph import Place, Session
from baltoro.rollout.gateway.rendering import Rendering
from baltoro.rollout.gateway.responses import Responses
from baltoro.rollout.gateway.said import BrokenMedia, Said, Setting
from baltoro.rollout.gateway.store import MemoryStore, Store
from baltoro.rollout.gateway.traces import session_traces

_log = logging.getLogger(__name__)
_PREPARED_AT_ONCE = 2
_DIALECTS: dict[str, Dialect] = {"chat/completions": Chat(), "messages": Anthropic(), "responses": Responses()}
_SESSION_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
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


@dataclass(frozen=True, eq=False)
class _Asked:
    """A request that was read. session, place: where it is recorded, None where it is not."""

    dialect: Dialect
    request: ChatRequest
    dialogue: Dialogue
    setting: Setting
    job: Job
    session: Session | None
    place: Place | None
    recorded: int
    started: float


class Api:
    """Answers requests with `engine`, which must be running, in the role named by `config.name`."""

    def __init__(
        self,
        engine: StreamingEngine,
        tokenizer: Tokenizer,
        media: MediaSpec,
        config: ApiConfig,
        store: Store | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._rendering = Rendering(tokenizer, media)
        self._config = config
        self._store = store or MemoryStore()
        self._sessions: dict[str, Session] = {}
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
        for prefix in ("", "/sessions/{session}"):
            app.router.add_get(prefix + "/v1/models", self._list_models)
            app.router.add_get(prefix + "/v1/models/{name:.+}", self._one_model)
            for path in _DIALECTS:
                app.router.add_post(f"{prefix}/v1/{path}", self._complete)
        return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when the running ones are answered."""
        self._draining = True
        await self._idle.wait()

    async def traces(self, session: str, *, trainable: bool = True) -> tuple[Trace, ...]:
        """What was recorded, for the trainer. Raises ValueError for a session that made no call."""
        found = await self._session(session)
        if not found.calls:
            raise ValueError(f"session {session} made no call")

        def export() -> tuple[Trace, ...]:
            files = self._store.files(found)
            return session_traces(found, self._rendering, files, role=self._config.name, trainable=trainable)

        return await asyncio.to_thread(export)

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """The boundary at which every failure becomes an answer in the dialect's form."""
        try:
            self._authorise(request)
            return await handler(request)
        except ApiError as error:
            return _refusal(request, error)
        except web.HTTPRequestEntityTooLarge:
            limit = self._config.max_body
            return _refusal(request, ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large"))
        except web.HTTPException as error:
            refusal = _refusal(request, ApiError(error.status, f"{request.method} {request.path}: {error.reason}"))
            if "Allow" in error.headers:
                refusal.headers["Allow"] = error.headers["Allow"]
            return refusal
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _refusal(request, _failed())

    def _authorise(self, request: web.Request) -> None:
        key = self._config.api_key
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = given or request.headers.get("x-api-key", "")
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
        started = time.time()
        dialect = _dialect(http)
        session = await self._session(http.match_info["session"]) if "session" in http.match_info else None
        with self._counted() as count:
            count(1)
            data = await http.read()
            request = await asyncio.to_thread(lambda: dialect.read(read_object(data)))
            self._check_model(request.model)
            count(request.n - 1)
            async with self._preparing:
                asked = await asyncio.to_thread(self._prepare, dialect, request, session, started)
            if request.stream:
                return await self._stream(http, asked)
            return await self._answer(asked)

    async def _session(self, id: str) -> Session:
        if not _SESSION_ID.fullmatch(id):
            raise ApiError(400, "a session's id has 1 to 128 letters, digits and . _ ~ -", param="session")
        if id not in self._sessions:
            found = await asyncio.to_thread(self._store.load, id)
            self._sessions.setdefault(id, found or Session(id))
        return self._sessions[id]

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

    def _prepare(self, dialect: Dialect, request: ChatRequest, session: Session | None, started: float) -> _Asked:
        """Runs in a thread: decodes pictures and videos, and encodes."""
        limit = self._config.max_len
        tools = read_tools(request.tools)
        setting = Setting(tuple(tools) if request.tool_choice == "auto" else (), request.thinks)
        dialogue = read_dialogue(request.messages, session.call_ids if session else ())
        place = session.place(setting, dialogue.said) if session else None
        chain = session.chain(place.parent) if session and place else []
        try:
            prompt = self._prompt(request, dialogue, setting, place, session, limit - 1)
        except TooLong:
            raise _too_long(f"the messages take more than {limit - 1} tokens", limit) from None
        except BrokenMedia as error:
            raise media_fault(dialogue.places[error.media.hash], error.media.kind, error) from None
        except (ValueError, RecursionError) as error:  # a schema without a TypeScript form; a broken video
            fault = "a schema is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ApiError(400, fault) from None
        max_tokens = request.max_completion_tokens or request.max_tokens or limit - len(prompt.ids)
        if len(prompt.ids) + max_tokens > limit:
            raise _too_long(f"the messages take {len(prompt.ids)} tokens and the completion up to {max_tokens}", limit)
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
        samplings = [
            Sampling(max_tokens, request.temperature, request.top_p, derive_seed(seed, i) if i else seed)
            for i in range(request.n)
        ]
        calls = "none" if request.tool_choice == "none" else "any" if request.parallel_tool_calls else "one"
        job = Job(request.model, prompt, samplings, tools, request.thinks, request.stops, calls)
        recorded = sum(len(call.prompt.ids) + len(call.ids) for call in chain)
        return _Asked(dialect, request, dialogue, setting, job, session, place, recorded, started)

    def _prompt(
        self,
        request: ChatRequest,
        dialogue: Dialogue,
        setting: Setting,
        place: Place | None,
        session: Session | None,
        limit: int,
    ) -> TokenSequence:
        said, files = dialogue.said, dialogue.files
        if session is None or place is None:
            return self._rendering.begin(said, setting, files, request.keeps_reasoning, limit)
        chain = session.chain(place.parent)
        if place.prompt is not None:
            return self._rendering.again(chain, place.prompt, files)
        if not chain:
            return self._rendering.begin(said, setting, files, True, limit)
        return self._rendering.go_on(chain, said[place.begin :], setting, files, limit)

    async def _speak(self, job: Job, on_step: Callable[[Choice, Step], Awaitable[None]]) -> list[Choice]:
        """All choices of a request at the same time; each step is handed to `on_step` before the next."""
        choices = [Choice(job, index) for index in range(len(job.samplings))]

        async def one(choice: Choice) -> None:
            async with aclosing(speak(self._engine, job, self._tokenizer, choice.index)) as steps:
                async for step in steps:
                    choice.add(step)
                    await on_step(choice, step)

        async with asyncio.TaskGroup() as group:
            for choice in choices:
                group.create_task(one(choice))
        return choices

    async def _record(self, asked: _Asked, choices: Sequence[Choice]) -> None:
        """Returns when the answers are safe; only then may the client learn that they ended."""
        if asked.session is None or asked.place is None:
            return
        ids = asked.job.prompt.ids[asked.recorded :]
        now = time.time()
        calls = [
            asked.session.add(
                asked.place,
                asked.setting,
                asked.dialogue.said,
                ids,
                choice.sampled,
                Said("assistant", tuple(filter(None, [said.text])), said.reasoning, said.tool_calls),
                choice.finish or "",
                asked.dialect.name,
                asked.started,
                now,
            )
            for choice in choices
            for said in [choice.message]
        ]
        await self._store.save(asked.session.id, calls, asked.dialogue.files)

    async def _answer(self, asked: _Asked) -> web.Response:
        async def nothing(choice: Choice, step: Step) -> None:
            pass

        choices = await self._speak(asked.job, nothing)
        await self._record(asked, choices)
        return web.json_response(asked.dialect.whole(asked.request, asked.job, choices, self._tokenizer))

    async def _stream(self, http: web.Request, asked: _Asked) -> web.StreamResponse:
        """Server-sent events. The status waits for the first token, so that an engine that fails at once is a 500."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        told = asked.dialect.stream(asked.request, asked.job, self._tokenizer)
        turn = asyncio.Lock()  # the choices of one request write to one connection
        last: list[bytes] = []

        async def send(data: bytes) -> None:
            async with turn:
                if not response.prepared:
                    await response.prepare(http)
                await response.write(data)

        async def write(choice: Choice, step: Step) -> None:
            data = told.step(choice, step)
            if step.finish:
                last.append(data)
            elif data:
                await send(data)

        try:
            choices = await self._speak(asked.job, write)
            await self._record(asked, choices)
        except Exception:
            if http.transport is None:  # the client left
                return response
            if not response.prepared:
                raise
            _log.exception("%s failed in the middle of a stream", http.path)
            await send(told.error(asked.dialect.error(_failed())))
            return response
        await send(b"".join([*last, told.end(choices)]))
        return response


def _dialect(request: web.Request) -> Dialect:
    """Errors of other paths are told as chat completions tell them."""
    return next(
        (d for path, d in _DIALECTS.items() if request.path.endswith("/v1/" + path)), _DIALECTS["chat/completions"]
    )


def _too_long(fault: str, limit: int) -> ApiError:
    fault = f"{fault}; this model's context is {limit} tokens"
    return ApiError(400, fault, code="context_length_exceeded", param="messages")


def _failed() -> ApiError:
    return ApiError(500, "the engine failed; the server's log says why", code="engine_failed")


def _refusal(request: web.Request, error: ApiError) -> web.Response:
    headers = {"Retry-After": str(error.retry_after_s)} if error.status in (429, 503) else None
    return web.json_response(_dialect(request).error(error), status=error.status, headers=headers)


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
