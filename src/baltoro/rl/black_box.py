"""Training of black-box agents (appendix D): a program of its own talks to the gateway, which records the tokens."""

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence

from aiohttp import web

from baltoro.agent.engine import StreamingEngine
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.api import Api, ApiConfig
from baltoro.rollout.gateway.engine import EngineUpstream

# The program is ours: its own concurrency is the limit. Bytes of a request, and of a line with an answer: an answer may
# be as long as a dialogue.
_MAX_CHOICES, _MAX_BODY = 2**20, 2**26


class Program:
    """A running program that reads jobs from its standard input, a line each, and prints the answer of each, as
    `swarm.client` does."""

    def __init__(self, api: Api, port: int, process: asyncio.subprocess.Process) -> None:
        self._api = api
        self._port = port
        self._process = process
        self._waiting: dict[str, asyncio.Future[str]] = {}

    async def solve(self, session: str, job: Mapping[str, object]) -> tuple[str, Trace]:
        """The program's answer and what the model said on the way. A dialogue that the program held beside its last
        one counts as a subagent's. Raises RuntimeError where the program fails at the job, or ends."""
        self._waiting[session] = asyncio.get_running_loop().create_future()
        base_url = f"http://127.0.0.1:{self._port}/sessions/{session}/v1"
        line = json.dumps({"session": session, "base_url": base_url, "job": job}) + "\n"
        try:
            assert self._process.stdin
            self._process.stdin.write(line.encode())
            answer = await self._waiting[session]
        finally:
            del self._waiting[session]
        *others, trace = await self._api.traces(session)
        if others:
            turn = dataclasses.replace(trace.turns[-1], children=tuple(others))
            trace = dataclasses.replace(trace, turns=(*trace.turns[:-1], turn))
        return answer, trace

    async def read(self) -> None:
        """Hands out answers until the program ends."""
        assert self._process.stdout
        while line := await self._process.stdout.readline():
            told = json.loads(line)
            waiting = self._waiting.get(told["session"])
            if waiting is None or waiting.done():  # its episode was cancelled
                continue
            if "error" in told:
                waiting.set_exception(RuntimeError(f"the program failed: {told['error']}"))
            else:
                waiting.set_result(told["answer"])
        status = await self._process.wait()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(RuntimeError(f"the program ended with status {status}; its output says why"))


@contextlib.asynccontextmanager
async def program(
    command: Sequence[str], engine: StreamingEngine, tokenizer: Tokenizer, media: MediaSpec, role: str, max_len: int
) -> AsyncGenerator[Program]:
    """Runs `command` with a gateway of its own around the running engine; ends both with the block."""
    key = secrets.token_urlsafe()
    config = ApiConfig(role, max_choices=_MAX_CHOICES, max_body=_MAX_BODY, api_keys=(key,))
    api = Api(EngineUpstream(engine, tokenizer, media, max_len), config)
    runner = api.runner()
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_BODY,
            env={**os.environ, "OPENAI_API_KEY": key},
        )
        running = Program(api, runner.addresses[0][1], process)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(running.read())
                yield running
                assert process.stdin
                process.stdin.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    finally:
        await runner.cleanup()
