"""The floor: asyncio alone. A coroutine a task, which awaits the model and the tool and appends to a list; no tokens,
no parsing, no limits."""

import asyncio
import sys

from work import FINDING, QUESTION, REASONING, TURNS, Work


async def model(turn: int) -> tuple[str, dict[str, str | int]]:
    await asyncio.sleep(0)
    return REASONING, {"village": f"Askole {turn}", "year": 1874 + turn}


async def agent(work: Work) -> list[str]:
    dialogue = [QUESTION]
    for turn in range(TURNS):
        reasoning, arguments = await model(turn)
        dialogue.append(reasoning)
        dialogue.append(await work.look_up(**arguments))  # pyright: ignore[reportArgumentType]
    return [*dialogue, FINDING]


async def main(tasks: int) -> None:
    await Work(tasks).run(agent)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
