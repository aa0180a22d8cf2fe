"""One fixed held-out prompt, answered again and again while a model trains, so that a person sees it getting better."""

import asyncio
from dataclasses import dataclass

from baltoro.agent.engine import Sampling
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.kimi import KimiK25
from baltoro.serve.local import LocalEngine


@dataclass(frozen=True, eq=False)
class LivePrompt:
    """`title` says to a person what is asked."""

    title: str
    prompt: TokenSequence
    max_tokens: int = 24

    def complete(self, model: KimiK25, tokenizer: Tokenizer) -> str:
        """`title` and the greedy continuation, control tokens by name."""

        async def ask() -> str:
            engine = LocalEngine({"live": model}, tokenizer, slots=1, max_len=len(self.prompt.ids) + self.max_tokens)
            async with engine.run():
                completion = await engine.generate(self.prompt, Sampling(self.max_tokens, temperature=0.0), "live")
            return tokenizer.decode([i for i in completion.ids if i not in (tokenizer.end_think, tokenizer.im_end)])

        training = model.training
        text = asyncio.run(ask())
        model.train(training)
        return f"{self.title} -> {text}"
