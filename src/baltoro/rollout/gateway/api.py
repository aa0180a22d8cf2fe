"""The gateway over HTTP: the dialects, and sessions that record what is asked through them.

`/v1/...` answers and records nothing; `/sessions/{id}/v1/...` answers alike and records every call. A request lives as
long as its connection: when the client leaves, its handler is cancelled and the work on it ends. An engine may compute
on this event loop, so whatever takes long here is done in threads.
"""

import asyncio
import hmac
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from aiohttp import web

from baltoro.agent.trace import Trace
from baltoro.rollout.gateway.answer import Choice, Job, Step
from baltoro.rollout.gateway.anthropic import Anthropic
from baltoro.rollout.gateway.chat import Chat
from baltoro.rollout.gateway.dialect import Dialect
from baltoro.rollout.gateway.dialogue import NOTHING, read_dialogue, read_tools
from baltoro.rollout.gateway.errors import ApiError, read_object
from baltoro.rollout.gateway.graph import Session
from baltoro.rollout.gateway.heard import Heard
from baltoro.rollout.gateway.metrics import Metrics
from baltoro.rollout.gateway.recent import Recent
from baltoro.rollout.gateway.replay import Told
from baltoro.rollout.gateway.responses import Responses
from baltoro.rollout.gateway.said import Said, Setting
from baltoro.rollout.gateway.sessions import Held, Sessions
from baltoro.rollout.gateway.store import MemoryStore, Store
from baltoro.rollout.gateway.traces import session_json, session_traces
from baltoro.rollout.gateway.upstream import Ask, Upstream
from baltoro.rollout.lag import LoopLag

_log = logging.getLogger(__name__)
_CHAT = Chat()
_DIALECTS: dict[str, Dialect] = {"chat/completions": _CHAT, "messages": Anthropic(), "responses": Responses()}
_ADMINS = re.compile(r"/admin/.*|/sessions/[^/]*")
_HEARD_BYTES = 2**28
_SESSION_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ApiConfig:
    """`name`: of the model. `max_choices`: completions at once, those that wait for the engine included; more are
    answered with 429. `max_key_choices`: the same for one API key. `max_body`: bytes. `max_held`: bytes of idle
    sessions in memory; where there is a store, it gives back the others. Without `api_keys` none is asked
    for. `admin_key` opens what is not for agents: pause, resume, drain and the recorded sessions; empty, nothing
    does."""

    name: str
    max_choices: int
    max_body: int
    api_keys: tuple[str, ...] = ()
    max_key_choices: int | None = None
    max_held: int = 2**30
    admin_key: str = field(default="", repr=False)


@dataclass(frozen=True, eq=False)
class _Work:
    """A request in hand. session: where it is recorded, None where it is not."""

    dialect: Dialect
    ask: Ask
    job: Job
    session: Session | None
    started: float


class Api:
    """Answers requests with `upstream`, which must be running, under the name `config.name`. `engine`: the numbers of
    what computes behind it. `lag` is known while it watches."""

    def __init__(
        self,
        upstream: Upstream,
        config: ApiConfig,
        store: Store | None = None,
        engine: Callable[[], Mapping[str, float]] = dict[str, float],
    ) -> None:
        self._upstream = upstream
        self._config = config
        self._store = store or MemoryStore()
        self._sessions = Sessions(self._store, config.max_held)
        self._heard = Recent[Heard](_HEARD_BYTES)
        self._created = int(time.time())
        self._running = Counter[str]()  # completions, by API key
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._paused = False
        self._engine = engine
        self.lag = LoopLag()
        self.metrics = Metrics()

    def runner(self) -> web.AppRunner:
        """Cancels the handler whose client leaves."""
        app = web.Application(middlewares=[self._guard], client_max_size=self._config.max_body)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._tell_metrics)
        for action in (self.pause, self.resume, self.drain):
            app.router.add_post(f"/admin/{action.__name__}", self._administer(action))
        app.router.add_get("/sessions/{session}", self._tell_session)
        for prefix in ("", "/sessions/{session}"):
            app.router.add_get(prefix + "/v1/models", self._list_models)
            app.router.add_get(prefix + "/v1/models/{name:.+}", self._one_model)
            for path in _DIALECTS:
                app.router.add_post(f"{prefix}/v1/{path}", self._complete)
        return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)

    async def pause(self) -> None:
        """Refuses new requests with 429 until `resume`; the running ones go on. So weights can be changed."""
        self._paused = True

    async def resume(self) -> None:
        self._paused = False

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when the running ones are answered."""
        self._draining = True
        await self._idle.wait()

    async def session(self, id: str) -> Session:
        """To be read. Raises ApiError 400 for what is no session's id."""
        async with self._using(id) as held:
            return held.session

    def _using(self, id: str) -> AbstractAsyncContextManager[Held]:
        """Raises ApiError 400 for what is no session's id."""
        if not _SESSION_ID.fullmatch(id):
            raise ApiError(400, "a session's id has 1 to 128 letters, digits and . _ ~ -", param="session")
        return self._sessions.using(id)

    async def traces(self, id: str, *, trainable: bool = True) -> tuple[Trace, ...]:
        """What was recorded, for the trainer. Raises ValueError for a session that made no call."""
        session, role = await self.session(id), self._config.name
        if not session.calls:
            raise ValueError(f"session {id} made no call; is its id right?")
        if not self._upstream.exact:
            raise ValueError("the upstream tells no token ids; train on one that does (vLLM, SGLang, a local engine)")

        files = await self._store.files(session)
        rendering = self._upstream.rendering
        return await asyncio.to_thread(
            lambda: session_traces(session, rendering, files, role=role, trainable=trainable)
        )

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
        if request.path == "/health":
            return
        given, config = _key(request), self._config
        if _ADMINS.fullmatch(request.path):
            if not config.admin_key or not hmac.compare_digest(given.encode(), config.admin_key.encode()):
                raise ApiError(401, "this needs the admin key", code="invalid_api_key")
            return
        known = [*config.api_keys, config.admin_key]
        if config.api_keys and not any(key and hmac.compare_digest(given.encode(), key.encode()) for key in known):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _health(self, request: web.Request) -> web.Response:
        if self._draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return web.json_response({"status": "ok", "running": self._running.total()})

    async def _tell_metrics(self, request: web.Request) -> web.Response:
        gauges = {
            "completions_running": self._running.total(),
            "sessions": len(self._sessions),
            "paused": int(self._paused or self._draining),
            "loop_lag_p50_seconds": self.lag.quantile(0.5),
            "loop_lag_p99_seconds": self.lag.quantile(0.99),
            **{f"engine_{name}": value for name, value in self._engine().items()},
        }
        return web.Response(text=self.metrics.text(gauges), content_type="text/plain")

    def _administer(self, action: Callable[[], Awaitable[None]]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            await action()
            return web.json_response({"paused": self._paused, "draining": self._draining})

        return handle

    async def _tell_session(self, request: web.Request) -> web.Response:
        session = await self.session(request.match_info["session"])
        body = await asyncio.to_thread(lambda: orjson.dumps(session_json(session)))
        return web.Response(body=body, content_type="application/json")

    async def _list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def _one_model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["name"])
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._config.name,
            "object": "model",
            "created": self._created,
            "owned_by": "baltoro",
            "max_model_len": self._upstream.max_len,
            "records": "tokens" if self._upstream.exact else "text",
        }

    def _check_model(self, name: str) -> None:
        if name != self._config.name:
            fault = f"there is no model {name}; this server has {self._config.name}"
            raise ApiError(404, fault, code="model_not_found", param="model")

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        begun = time.monotonic()
        dialect = _dialect(http)
        try:
            response = await self._completed(http, dialect)
        except ApiError as error:
            self.metrics.answered(dialect.name, error.status, time.monotonic() - begun)
            raise
        self.metrics.answered(dialect.name, response.status, time.monotonic() - begun)
        return response

    async def _completed(self, http: web.Request, dialect: Dialect) -> web.StreamResponse:
        if self._draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self._paused:
            raise ApiError(429, "the server is paused; try again", code="paused")
        with self._counted(_key(http)) as count:
            count(1)
            data = await http.read()
            if "session" not in http.match_info:
                return await self._say(http, dialect, data, None, count, None)
            async with self._using(http.match_info["session"]) as held:
                told = await held.replays.find(http.path, data, http.headers)
                if told is not None:
                    self.metrics.replayed += 1
                    return web.Response(body=told.body, content_type=told.kind)
                async with held.replays.answering(http.path, data, http.headers) as answer:
                    return await self._say(http, dialect, data, held.session, count, answer)

    async def _say(
        self,
        http: web.Request,
        dialect: Dialect,
        data: bytes,
        session: Session | None,
        count: Callable[[int], None],
        answer: "asyncio.Future[Told] | None",
    ) -> web.StreamResponse:
        """Reads the request and answers it; `answer` gets what was said."""
        started = time.time()

        # A thread would hold the interpreter's lock for as long, and cost its changes of hands besides.
        body = read_object(data)
        heard = self._heard.get(session.id) if session else None
        chat = dialect is _CHAT
        request = dialect.read(heard.known(body) if heard and chat else body)
        self._check_model(request.model)
        count(request.n - 1)

        tools = tuple(read_tools(request.tools))
        setting = Setting(tools if request.tool_choice == "auto" else (), request.thinks)
        place, chain = None, []
        if session is None:
            dialogue = read_dialogue(request.messages)
        else:
            same = heard.same(request.messages) if heard else 0
            known = heard.dialogue if heard else NOTHING
            dialogue = read_dialogue(request.messages, session.call_ids, known, same)
            keys = heard.keys[:same] if heard and heard.setting == setting.digest else ()
            place = session.place(setting, dialogue.said, keys)
            chain = session.chain(place.parent)
            told = body["messages"] if chat else ()
            new = Heard(told, request.messages, dialogue, setting.digest, place.keys)
            self._heard.keep(session.id, new, len(data))
        ask = Ask(session.id if session else "", dialect.name, request, body, dialogue, setting, place, chain)
        job = replace(await self._upstream.prepare(ask), tools=tools)
        work = _Work(dialect, ask, job, session, started)
        if request.stream:
            return await self._stream(http, work, answer)
        choices = await self._speak(work, _nothing)
        await self._record(work, choices)
        told = Told(orjson.dumps(dialect.whole(request, work.job, choices, self._upstream.spell)), "application/json")
        if answer is not None:
            answer.set_result(told)
        return web.Response(body=told.body, content_type=told.kind)

    @contextmanager
    def _counted(self, key: str) -> Generator[Callable[[int], None]]:
        """Gives a function that admits so many completions more, until the end of the block."""
        held = 0

        def count(more: int) -> None:
            nonlocal held
            config = self._config
            ours = self._running[key]
            for running, limit in ((self._running.total(), config.max_choices), (ours, config.max_key_choices)):
                if limit is not None and running + more > limit:
                    fault = f"{running} completions are running, of at most {limit}; try again"
                    raise ApiError(429, fault, code="rate_limit_exceeded")
            held += more
            self._running[key] += more
            self._idle.clear()

        try:
            yield count
        finally:
            self._running[key] -= held
            if not self._running[key]:
                del self._running[key]
            if not self._running:
                self._idle.set()

    async def _speak(self, work: _Work, on_step: Callable[[Choice, Step], Awaitable[None]]) -> list[Choice]:
        """All choices of a request at the same time; each step is handed to `on_step` before the next."""
        choices = [Choice(work.job, index) for index in range(work.ask.request.n)]

        async def one(choice: Choice) -> None:
            async with aclosing(self._upstream.speak(work.ask, work.job, choice.index)) as steps:
                async for step in steps:
                    choice.add(step)
                    await on_step(choice, step)

        if len(choices) == 1:
            await one(choices[0])
        else:
            async with asyncio.TaskGroup() as group:
                for choice in choices:
                    group.create_task(one(choice))
        return choices

    async def _record(self, work: _Work, choices: Sequence[Choice]) -> None:
        """Returns when the answers are safe; only then may the client learn that they ended."""
        metrics, ask = self.metrics, work.ask
        metrics.tokens["prompt"] += len(work.job.read)
        metrics.tokens["completion"] += sum(len(choice.drawn.ids) for choice in choices)
        if work.session is None or ask.place is None:
            return
        place, added = work.session.fit(ask.place, work.job.read)
        now = time.time()
        calls = [
            work.session.add(
                place,
                ask.setting,
                ask.dialogue.said,
                added,
                choice.drawn,
                Said("assistant", tuple(filter(None, [said.text])), said.reasoning, said.tool_calls),
                choice.finish or "",
                work.dialect.name,
                work.started,
                now,
            )
            for choice in choices
            for said in [choice.message]
        ]
        metrics.recorded += len(calls)
        metrics.broken += sum(bool(call.broke) for call in calls)
        await self._store.save(work.session, calls, ask.dialogue.files)

    async def _stream(
        self, http: web.Request, work: _Work, answer: "asyncio.Future[Told] | None"
    ) -> web.StreamResponse:
        """Server-sent events. The status waits for the first token, so that an engine that fails at once is a 500."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        told = work.dialect.stream(work.ask.request, work.job, self._upstream.spell)
        turn = asyncio.Lock()  # the choices of one request write to one connection
        last: list[bytes] = []
        sent: list[bytes] = []

        async def send(data: bytes) -> None:
            async with turn:
                if not response.prepared:
                    await response.prepare(http)
                if answer is not None:
                    sent.append(data)
                await response.write(data)

        async def write(choice: Choice, step: Step) -> None:
            data = told.step(choice, step)
            if step.finish:
                last.append(data)
            elif data:
                await send(data)

        try:
            choices = await self._speak(work, write)
            await self._record(work, choices)
        except Exception:
            if http.transport is None:  # the client left
                return response
            if not response.prepared:
                raise
            _log.exception("%s failed in the middle of a stream", http.path)
            await send(told.error(work.dialect.error(_failed())))
            return response
        end = b"".join([*last, told.end(choices)])
        if answer is not None:
            answer.set_result(Told(b"".join([*sent, end]), "text/event-stream"))
        await send(end)
        return response


async def _nothing(choice: Choice, step: Step) -> None:
    pass


def _key(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")


def _dialect(request: web.Request) -> Dialect:
    """Errors of other paths are told as chat completions tell them."""
    return _DIALECTS.get(request.path.rpartition("/v1/")[2], _DIALECTS["chat/completions"])


def _failed() -> ApiError:
    return ApiError(500, "the engine failed; the server's log says why", code="engine_failed")


def _refusal(request: web.Request, error: ApiError) -> web.Response:
    headers: Mapping[str, str] | None = None
    if error.status in (429, 503):
        headers = {"Retry-After": str(error.retry_after_s)}
    return web.json_response(_dialect(request).error(error), status=error.status, headers=headers)
