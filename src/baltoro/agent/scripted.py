"""An engine without a model: it follows a script."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Sequence

from baltoro.agent.engine import Completion, Sampled, Sampling
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer

Script = Callable[[str, str], str]
"""(decoded prompt, role) to completion text."""


class ScriptedEngine:
    """Answers with what a script says. A list of texts is read in the order of the calls, whoever makes them;
    a function decides by the prompt, and so does not depend on scheduling.

    In completion texts the names of special tokens stand for the tokens. <|im_end|> is added at the end.
    """

    def __init__(self, tokenizer: Tokenizer, script: Script | Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._script = script
        self._names = re.compile("(" + "|".join(re.escape(name) for name in tokenizer.special) + ")")
        self.prompts: list[TokenSequence] = []
        self.samplings: list[Sampling] = []

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        position = len(self.prompts)
        self.prompts.append(TokenSequence(list(prompt.ids), list(prompt.media)))
        self.samplings.append(sampling)
        if callable(self._script):
            text = self._script(self._tokenizer.decode(prompt.ids), role)
        else:
            text = self._script[position]
        await asyncio.sleep(0)
        ids = [*self._encode(text), self._tokenizer.im_end]
        cut = len(ids) > sampling.max_tokens
        ids = ids[: sampling.max_tokens]
        return Completion(ids, [0.0] * len(ids), "length" if cut else "stop", weight_version=0)

    async def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        for token in (await self.generate(prompt, sampling, role)).ids:
            yield Sampled(token, 0.0)
            await asyncio.sleep(0)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._names.split(text):
            if piece in self._tokenizer.special:
                ids.append(self._tokenizer.special[piece])
            elif piece:
                ids += self._tokenizer.encode(piece)
        return ids


def completion_text(
    text: str = "", *, reasoning: str = "", calls: Sequence[tuple[str, dict[str, object]]] = (), first_index: int = 0
) -> str:
    """What a model in thinking mode writes after <think>: reasoning, text, then calls (name, arguments)."""
    section = "".join(
        f"<|tool_call_begin|>functions.{name}:{first_index + index}"
        f"<|tool_call_argument_begin|>{json.dumps(arguments, ensure_ascii=False)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    if section:
        section = f"<|tool_calls_section_begin|>{section}<|tool_calls_section_end|>"
    return f"{reasoning}</think>{text}{section}"
