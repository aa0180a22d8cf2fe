"""Real sockets: a server as OpenEnv's own speaks through our client, our server through OpenEnv's messages, and both
against each other."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from baltoro.agent.loop import Limits
from baltoro.chat.messages import Image, ToolCall, assistant
from baltoro.rollout.conform import conform
from baltoro.rollout.desktop import env as desktop
from baltoro.rollout.env import Session
from baltoro.rollout.openenv import from_openenv, openenv_app
from baltoro.rollout.pictures import data_uri, from_data_uri

LIMITS = Limits(40, 99_999, 200)
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


@asynccontextmanager
async def serving(app: web.Application) -> AsyncGenerator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def countdown() -> web.Application:
    """Counts down from the seed by what one takes; as pydantic and OpenEnv 0.3 put it on the wire."""
    schema = {
        "title": "TakeAction", "type": "object", "additionalProperties": False, "required": ["take"],
        "description": "Take some.",
        "properties": {
            "metadata": {"title": "Metadata", "type": "object", "additionalProperties": True},
            "take": {"title": "Take", "type": "integer", "minimum": 1, "maximum": 3},
        },
    }  # fmt: skip

    async def connect(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        left = 0
        async for message in socket:
            told = json.loads(message.data)
            if told["type"] == "close":
                break
            if told["type"] == "reset":
                left = told["data"]["seed"] + 5
            elif told["data"]["take"] > left:
                await socket.send_json({"type": "error", "data": {"message": "too many", "code": "EXECUTION_ERROR"}})
                continue
            else:
                left -= told["data"]["take"]
            seen = {"left": left, "screen": data_uri(PIXELS)}
            data = {"observation": seen, "reward": None if told["type"] == "reset" else 0.5, "done": left == 0}
            await socket.send_json({"type": "observation", "data": data})
        return socket

    async def schemas(request: web.Request) -> web.Response:
        return web.json_response({"action": schema, "observation": {}, "state": {}})

    app = web.Application()
    app.add_routes([web.get("/ws", connect), web.get("/schema", schemas)])
    return app


def take(number: int, turn: int) -> Any:
    return assistant(tool_calls=(ToolCall(f"functions.act:{turn}", "act", json.dumps({"take": number})),))


def test_an_openenv_server_is_played_and_scored() -> None:
    async def main() -> None:
        async with serving(countdown()) as url:
            env = from_openenv(url, "countdown", "1", "Take all.", LIMITS)
            session = Session(env)
            opening = await session.reset({"seed": 1}, 1)
            text, seen, picture = opening[-1].content
            assert (text, seen) == ("Take all.", '{"left": 6, "screen": "picture 1"}')
            assert isinstance(picture, Image)
            assert np.array_equal(picture.pixels, PIXELS)
            (tool,) = session.tools
            assert (tool.name, tool.description) == ("act", "Take some.")
            assert tool.parameters["properties"] == {"take": {"type": "integer", "minimum": 1, "maximum": 3}}
            answers = [(await session.step(take(n, i))).observation[0].text for i, n in enumerate((3, 2, 3, 1, 1))]
            assert ['"left": 3' in answers[0], '"left": 1' in answers[1]] == [True, True]
            assert answers[2] == "error: too many"
            assert answers[3].endswith("reward 0.5\nThe episode is over.")
            assert answers[4] == "error: the episode is over; answer"
            step = await session.step(assistant("done"))
            assert (step.reward, step.info["signals"]["steps"]) == (1.5, 3.0)
            await session.close()
            assert [check for check in await conform(env) if check.faults] == []

    asyncio.run(main())


def test_our_server_by_its_messages() -> None:
    async def main() -> None:
        async with serving(openenv_app(desktop, 1)) as url, aiohttp.ClientSession(url) as client:
            async with client.get("/health") as answer:
                assert await answer.json() == {"status": "healthy"}
            async with client.get("/metadata") as answer:
                assert (await answer.json())["name"] == "desktop"

            async def ask(socket: aiohttp.ClientWebSocketResponse, text: str) -> Any:
                await socket.send_str(text)
                return await socket.receive_json()

            async with client.ws_connect("/ws") as socket:
                assert (await ask(socket, "{"))["data"]["code"] == "INVALID_JSON"
                assert (await ask(socket, '{"type": "dance"}'))["data"]["code"] == "UNKNOWN_TYPE"
                early = '{"type": "step", "data": {"answer": "x"}}'
                assert (await ask(socket, early))["data"]["code"] == "VALIDATION_ERROR"
                told = (await ask(socket, '{"type": "reset", "data": {"seed": 5, "episode_id": "e"}}'))["data"]
                assert (told["reward"], told["done"]) == (None, False)
                _, picture = told["observation"]["messages"][0]["content"]
                assert from_data_uri(picture["image"]).pixels.shape == (168, 224, 3)
                click = {"type": "step", "data": {"tool": "scroll", "arguments": {"rows": 1}}}
                told = (await ask(socket, json.dumps(click)))["data"]
                assert (told["reward"], told["done"], len(told["observation"]["messages"])) == (0.0, False, 1)
                state = await ask(socket, '{"type": "state"}')
                assert state == {"type": "state", "data": {"episode_id": "e", "step_count": 1}}
                async with client.ws_connect("/ws") as second:
                    assert (await second.receive_json())["data"]["code"] == "CAPACITY_REACHED"
                told = (await ask(socket, early))["data"]
                assert (told["reward"], told["done"], told["observation"]["signals"]["actions"]) == (0.0, True, 1.0)
                await socket.send_json({"type": "close"})
            async with client.ws_connect("/ws") as third:  # the place is free again
                assert (await ask(third, '{"type": "state"}'))["type"] == "state"

    asyncio.run(main())


def test_our_client_plays_on_our_server() -> None:
    async def main() -> None:
        async with serving(openenv_app(desktop, 8)) as url:
            env = from_openenv(url, "remote-desktop", "1", "Go on.", LIMITS)
            session = Session(env)
            opening = await session.reset({"seed": 5}, 5)
            assert [type(part) for part in opening[-1].content] == [str, str, Image]
            arguments = json.dumps({"tool": "scroll", "arguments": {"rows": 1}})
            step = await session.step(assistant(tool_calls=(ToolCall("functions.act:0", "act", arguments),)))
            assert any(isinstance(part, Image) for part in step.observation[0].content)
            await session.close()

    asyncio.run(main())
