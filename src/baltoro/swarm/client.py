"""Wide search by a program that knows an OpenAI-compatible endpoint and nothing of us: a black-box agent.

Reads one job a line from standard input, works on all of them at once, and prints a line for each that ended.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass

from openai import AsyncOpenAI, BadRequestError
from openai.types.chat import ChatCompletionMessageParam

from baltoro.agent.loop import derive_seed, run_calls
from baltoro.agent.tool import CallContext
from baltoro.chat.messages import ToolCall
from baltoro.swarm.demonstrations import NOTICE, SINGLE_PROMPT
from baltoro.swarm.wide import Library
from baltoro.world.entities import World
from baltoro.world.names import Split


@dataclass(frozen=True)
class Job:
    """A question about the pages of a world. `seed` decides every draw of the model."""

    model: str
    world: int
    split: Split
    question: str
    seed: int
    max_turns: int
    max_turn_tokens: int


async def answer(client: AsyncOpenAI, job: Job) -> str:
    """Turn after turn as `agent.loop` does, with text instead of tokens; the last turn is announced. Empty where the
    context was full."""
    library = Library(World(job.world, job.split).documents)
    toolbox = {tool.spec.name: tool for tool in library.tools}
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": SINGLE_PROMPT},
        {"role": "user", "content": job.question},
    ]
    turn, begin = 0, time.monotonic()
    while True:
        try:
            reply = await client.chat.completions.create(
                model=job.model,
                messages=messages,
                max_completion_tokens=job.max_turn_tokens,
                seed=derive_seed(job.seed, turn),
            )
        except BadRequestError as error:
            if error.code == "context_length_exceeded":
                return ""
            raise
        message = reply.choices[0].message
        turn += 1
        calls = [
            ToolCall(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls or ()
            if call.type == "function"
        ]
        if not calls or turn == job.max_turns:
            return (message.content or "").strip()
        messages.append(message.model_dump(exclude_none=True))  # pyright: ignore[reportArgumentType]
        contexts = [CallContext(None, derive_seed(job.seed, turn, index), begin) for index in range(len(calls))]
        for call, result in zip(calls, await run_calls(calls, contexts, toolbox), strict=True):
            text = "".join(part for part in result.shown if isinstance(part, str))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
        if turn == job.max_turns - 1:
            messages.append({"role": "user", "content": NOTICE})


async def main() -> None:
    """Each line in: {"session", "base_url", "job"}; each line out: {"session", "answer"} or {"session", "error"}."""

    async def work(line: str) -> None:
        given = json.loads(line)
        try:
            text = await answer(client.with_options(base_url=given["base_url"]), Job(**given["job"]))
            told = {"session": given["session"], "answer": text}
        except Exception as error:  # the boundary of a job: it never harms the others
            told = {"session": given["session"], "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)

    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with AsyncOpenAI() as client, asyncio.TaskGroup() as group:
        while line := await lines.readline():
            group.create_task(work(line.decode()))


if __name__ == "__main__":
    asyncio.run(main())
