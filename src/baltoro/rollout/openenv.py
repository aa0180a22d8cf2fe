"""OpenEnv servers as environments of ours, and ours as OpenEnv servers, over OpenEnv's WebSocket messages.

A message is {"type", "data"}: reset, step and state are answered by observation, observation and state, or by error
with a message and a code. `data` of an observation is {"observation", "reward", "done"}.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, cast

import aiohttp
from aiohttp import web

from baltoro.agent.loop import Limits
from baltoro.agent.tool import CallContext, ToolResult
from baltoro.chat.messages import Clip, Image, Message, Part, ToolCall, ToolSpec, Video, assistant
from baltoro.rollout.env import Env, Session, World, rewarding
from baltoro.rollout.judge import Task
from baltoro.rollout.pictures import PREFIX, data_uri, from_data_uri
from baltoro.rollout.toolset import untitled

Json = dict[str, Any]
_MAX_MESSAGE = 100 << 20


class _Refused(Exception):
    """The server answered with an error."""


def from_openenv(url: str, name: str, version: str, prompt: str, limits: Limits, step_s: float = 60.0) -> Env:
    """One tool, `act`, takes an action as the server's schema says. Observations are shown as JSON, PNG data URIs in
    them as pictures. Reward: the sum of the server's. Each episode is a session of its own, reset with its task's
    seed."""

    @asynccontextmanager
    async def open_world(task: Task, seed: int) -> AsyncGenerator[World]:
        async with (
            aiohttp.ClientSession(url.rstrip("/") + "/") as client,
            client.get("schema", raise_for_status=True) as answer,
            client.ws_connect("ws", max_msg_size=_MAX_MESSAGE) as socket,
        ):
            act = _Act(socket, (await answer.json())["action"], step_s)
            first = _shown(await act.ask("reset", task))
            yield World((prompt, *first), [act], facts=lambda: {"return": act.total, "steps": act.steps})
            await socket.send_json({"type": "close"})

    return rewarding(name, version, open_world, limits)


class _Act:
    sequential = True

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, schema: Json, step_s: float) -> None:
        fields = untitled(schema)
        cast(Json, fields.get("properties", {})).pop("metadata", None)
        self.spec = ToolSpec("act", str(fields.pop("description", "Act.")), fields)
        self._socket = socket
        self._step_s = step_s
        self._over = False
        self.total = 0.0
        self.steps = 0.0

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        if self._over:
            return ToolResult(error="the episode is over; answer")
        try:
            told = await self.ask("step", arguments)
        except _Refused as error:
            return ToolResult(error=str(error))
        reward = float(told.get("reward") or 0.0)
        self.total += reward
        self.steps += 1
        self._over = bool(told.get("done"))
        return ToolResult((*_shown(told), f"\nreward {reward:g}", *(["\nThe episode is over."] if self._over else [])))

    async def ask(self, kind: str, data: Json) -> Json:
        """Raises _Refused, ConnectionError, TimeoutError."""
        await self._socket.send_json({"type": kind, "data": data})
        async with asyncio.timeout(self._step_s):
            message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ConnectionError("the environment's server closed the connection")
        told = json.loads(message.data)
        if told["type"] == "error":
            raise _Refused(told["data"].get("message", "the environment refused"))
        return told["data"]


def _shown(told: Json) -> tuple[Part, ...]:
    """The observation as JSON, its pictures behind it."""
    pictures: list[Part] = []

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(below) for key, below in cast(Json, value).items()}
        if isinstance(value, list):
            return [without(below) for below in cast(list[Any], value)]
        if isinstance(value, str) and value.startswith(PREFIX):
            pictures.append(from_data_uri(value))
            return f"picture {len(pictures)}"
        return value

    return (json.dumps(without(told["observation"]), ensure_ascii=False), *pictures)


def openenv_app(env: Env, sessions: int) -> web.Application:
    """Serves `env` to at most `sessions` connections at once. An action is {"tool", "arguments"} or {"answer"}; `reset`
    takes a seed, or a task of one's own. Judges that ask a model have none here."""
    open_now = 0
    action = {
        "type": "object",
        "properties": {"tool": {"type": "string"}, "arguments": {"type": "object"}, "answer": {"type": "string"}},
    }
    observation = {"type": "object", "properties": {"messages": {"type": "array"}, "tools": {"type": "array"}}}
    state = {"type": "object", "properties": {"episode_id": {"type": "string"}, "step_count": {"type": "integer"}}}
    about = {"name": env.name, "version": env.version, "description": f"{env.name}, an environment of Baltoro"}

    async def connect(request: web.Request) -> web.WebSocketResponse:
        nonlocal open_now
        socket = web.WebSocketResponse(max_msg_size=_MAX_MESSAGE)
        await socket.prepare(request)
        if open_now >= sessions:
            await socket.send_json(_error("CAPACITY_REACHED", f"all {sessions} sessions are in use"))
            await socket.close()
            return socket
        open_now += 1
        server = _Server(env)
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                answer = await server.answer(message.data)
                if answer is None:
                    break
                await socket.send_json(answer)
        finally:
            open_now -= 1
            await server.session.close()
        return socket

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "healthy"})

    async def schema(request: web.Request) -> web.Response:
        return web.json_response({"action": action, "observation": observation, "state": state})

    async def metadata(request: web.Request) -> web.Response:
        return web.json_response(about)

    app = web.Application()
    app.add_routes([web.get("/ws", connect), web.get("/health", health), web.get("/schema", schema)])
    app.add_routes([web.get("/metadata", metadata)])
    return app


class _Server:
    """One connection: one session."""

    def __init__(self, env: Env) -> None:
        self.session = Session(env)
        self._env = env
        self._episode = ""

    async def answer(self, text: str) -> Json | None:
        """None where the client takes its leave."""
        try:
            message = json.loads(text)
        except ValueError as error:
            return _error("INVALID_JSON", f"Invalid JSON: {error}")
        data: Any = message.get("data") or {}
        try:
            match message.get("type"):
                case "reset":
                    seed = int(data.get("seed") or 0)
                    self._episode = str(data.get("episode_id") or uuid.uuid4())
                    told = await self.session.reset(data.get("task") or self._env.sample(seed), seed)
                    tools = [asdict(tool) for tool in self.session.tools]
                    return _observation({"messages": _messages(told), "tools": tools}, None, False)
                case "step":
                    step = await self.session.step(_message(data, len(self.session.turns)))
                    done = step.terminated or step.truncated
                    seen = {"messages": _messages(step.observation), "tools": [], **step.info}
                    return _observation(seen, step.reward if step.reward == step.reward else None, done)
                case "state":
                    steps = len(self.session.turns)
                    return {"type": "state", "data": {"episode_id": self._episode, "step_count": steps}}
                case "close":
                    return None
                case other:
                    return _error("UNKNOWN_TYPE", f"Unknown message type: {other}")
        except ValueError as error:
            return _error("VALIDATION_ERROR", str(error))
        except Exception as error:  # the boundary for environments: a session outlives what fails in it
            return _error("EXECUTION_ERROR", f"{type(error).__name__}: {error}")


def _error(code: str, message: str) -> Json:
    return {"type": "error", "data": {"message": message, "code": code}}


def _observation(observation: Json, reward: float | None, done: bool) -> Json:
    return {"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}}


def _message(action: Any, turn: int) -> Message:
    if not isinstance(action, dict) or not action.keys() & {"tool", "answer"}:
        raise ValueError('an action is {"tool", "arguments"} or {"answer"}')
    given = cast(Json, action)
    if not given.get("tool"):
        return assistant(str(given["answer"]))
    name, arguments = str(given["tool"]), json.dumps(given.get("arguments") or {})
    return assistant(tool_calls=(ToolCall(f"functions.{name}:{turn}", name, arguments),))


def _messages(messages: tuple[Message, ...]) -> list[Json]:
    return [{"role": message.role, "content": [_part(part) for part in message.content]} for message in messages]


def _part(part: Part) -> Json:
    match part:
        case str():
            return {"type": "text", "text": part}
        case Image():
            return {"type": "image", "image": data_uri(part.pixels)}
        case Clip():
            return {"type": "clip", "fps": part.fps, "frames": [data_uri(frame) for frame in part.frames]}
        case Video():
            return {"type": "video"}
