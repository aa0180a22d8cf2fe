"""The peer: verifiers 0.1.9.post3, the last release that runs rollouts in its own process; ToolEnv.generate.

Its client is an AsyncOpenAI whose `create` answers in the process, so that neither HTTP nor JSON is counted. It works
on messages, not on tokens. Cancelling `generate` leaves its rollouts running: they are cancelled one by one."""

import asyncio
import json
import sys
from typing import Any

import verifiers as vf
from datasets import Dataset
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from work import QUESTION, REASONING, TURNS, Work, arguments


def completion(turn: int) -> ChatCompletion:
    call = {"name": "look_up", "arguments": json.dumps(arguments(turn))}
    message = {
        "role": "assistant",
        "content": REASONING,
        "tool_calls": [{"id": f"functions.look_up:{turn}", "type": "function", "function": call}],
    }
    choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
    return ChatCompletion.model_validate(
        {"id": f"{turn}", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    )


async def main(tasks: int) -> None:
    work = Work(tasks)
    answers = [completion(turn) for turn in range(TURNS)]

    async def look_up(village: str, year: int = 0) -> str:
        """Looks a village up in the register.

        Args:
            village: its name
            year: of its bridge
        """
        return await work.look_up(village, year)

    async def create(messages: list[Any], **settings: Any) -> ChatCompletion:
        await asyncio.sleep(0)
        return answers[(len(messages) - 1) // 2]

    client = AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:9/v1")
    client.chat.completions.create = create  # type: ignore[method-assign]
    prompt = [{"role": "user", "content": QUESTION}]
    rows = [{"prompt": prompt, "answer": "", "task": "bench", "example_id": i} for i in range(tasks)]
    env = vf.ToolEnv(tools=[look_up], max_turns=TURNS + 2, dataset=Dataset.from_list(rows[:1]))
    async with work.lags():
        whole = asyncio.create_task(
            env.generate(rows, client, "m", max_concurrent=tasks, use_tqdm=False)  # type: ignore[arg-type]
        )
        await work.everybody.wait()
    work.all_live()
    whole.cancel()
    await asyncio.gather(whole, return_exceptions=True)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    work.report()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
