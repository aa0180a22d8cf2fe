"""The floor of a token-exact agent: asyncio, tiktoken and json by hand, for this one dialogue and nothing else. Ids are
decoded, the call is read, the result is encoded; ids, mask and log-probabilities grow. No faults, limits or schemas."""

import asyncio
import json
import sys
from pathlib import Path

from work import QUESTION, REASONING, TURNS, Work, arguments

from baltoro.chat.tokenizer import Tokenizer


async def main(tasks: int, ranks: Path) -> None:
    tokenizer = Tokenizer.load(ranks)
    encode, special = tokenizer._encoding.encode_ordinary, tokenizer.special  # pyright: ignore[reportPrivateUsage]
    completions = [
        [
            *encode(REASONING),
            special["</think>"],
            special["<|tool_call_begin|>"],
            *encode(f"functions.look_up:{turn}"),
            special["<|tool_call_argument_begin|>"],
            *encode(json.dumps(arguments(turn))),
            special["<|tool_call_end|>"],
            special["<|im_end|>"],
        ]
        for turn in range(TURNS)
    ]
    logprobs = [[-0.5] * len(ids) for ids in completions]

    async def model(prompt: list[int], turn: int) -> tuple[list[int], list[float]]:
        await asyncio.sleep(0)
        return completions[turn], logprobs[turn]

    async def agent(work: Work) -> list[int]:
        ids = encode(QUESTION)
        mask, kept = [0] * len(ids), [0.0] * len(ids)
        for turn in range(TURNS):
            sampled, drawn = await model(ids, turn)
            text = tokenizer.decode(sampled)
            call = text.partition("<|tool_call_argument_begin|>")[2].partition("<|tool_call_end|>")[0]
            result = encode(f"tool## Return of functions.look_up:{turn}\n" + await work.look_up(**json.loads(call)))
            ids += sampled + result
            mask += [1] * len(sampled) + [0] * len(result)
            kept += drawn + [0.0] * len(result)
        return ids

    await Work(tasks).run(agent)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
