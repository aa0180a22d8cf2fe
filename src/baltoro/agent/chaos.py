"""An engine that makes another one slow, unreliable and wrong, the same way every time."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Never

from baltoro.agent.engine import Completion, Engine, Overloaded, Sampled, Sampling
from baltoro.agent.loop import derive_seed
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chaos:
    """delay_s: seconds that a call takes at most beside the inner engine's. drops, hangs, malformed: shares of the
    calls that fail with ConnectionError, half of them after the inner engine has worked; that never end; that are
    answered with a damaged completion. storm_every_s, storm_s: within the last `storm_s` seconds of every
    `storm_every_s` on the loop's clock all calls are refused with Overloaded."""

    delay_s: float = 0.0
    drops: float = 0.0
    hangs: float = 0.0
    malformed: float = 0.0
    storm_every_s: float = 1.0
    storm_s: float = 0.0


class ChaosEngine:
    """What befalls a call follows from `seed`, the call's sampling seed, and how often a call of that seed has failed
    before: repeated, it may do better. Storms alone go by the clock; a call that one refused was no attempt."""

    def __init__(self, inner: Engine, tokenizer: Tokenizer, chaos: Chaos, *, seed: int) -> None:
        self._inner = inner
        self._tokenizer = tokenizer
        self._chaos = chaos
        self._seed = seed
        self._failures = Counter[int]()

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        draw, fate = await self._befall(sampling)
        if fate == "drop" and draw.random() < 0.5:
            self._drop(sampling)
        completion = await self._inner.generate(prompt, sampling, role)
        if fate == "drop":
            self._drop(sampling)
        return self._damaged(completion, draw) if fate == "malformed" else completion

    async def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        """A stream that fails does so after some of its tokens."""
        draw, fate = await self._befall(sampling)
        completion = await self._inner.generate(prompt, sampling, role)
        if fate == "malformed":
            completion = self._damaged(completion, draw)
        given = draw.randrange(len(completion.ids)) if fate == "drop" else len(completion.ids)
        for token, logprob in zip(completion.ids[:given], completion.logprobs[:given], strict=True):
            yield Sampled(token, logprob)
        if fate == "drop":
            self._drop(sampling)

    async def _befall(self, sampling: Sampling) -> tuple[random.Random, str]:
        chaos = self._chaos
        now = asyncio.get_running_loop().time()
        if (left := chaos.storm_every_s - now % chaos.storm_every_s) <= chaos.storm_s:
            raise Overloaded(left)
        draw = random.Random(derive_seed(self._seed, sampling.seed, self._failures[sampling.seed]))
        await asyncio.sleep(draw.random() * chaos.delay_s)
        chances = [chaos.drops, chaos.hangs, chaos.malformed]
        fate = draw.choices(["drop", "hang", "malformed", ""], [*chances, 1 - sum(chances)])[0]
        if fate == "hang":
            self._failures[sampling.seed] += 1
            await asyncio.get_running_loop().create_future()
        return draw, fate

    def _drop(self, sampling: Sampling) -> Never:
        self._failures[sampling.seed] += 1
        raise ConnectionError("the engine did not answer")

    def _damaged(self, completion: Completion, draw: random.Random) -> Completion:
        """Of the same length or shorter, and as aligned as before."""
        damage: Callable[[list[int], random.Random], list[int]] = draw.choice([self._cut, self._stray, self._garbage])
        ids = damage(list(completion.ids), draw)
        return replace(completion, ids=ids, logprobs=completion.logprobs[: len(ids)])

    def _cut(self, ids: list[int], draw: random.Random) -> list[int]:
        """The end of the turn comes too early, within a call where there is one."""
        calls = [i for i, token in enumerate(ids) if token == self._tokenizer.tool_call_begin]
        return [*ids[: draw.randrange(calls[-1] if calls else 0, len(ids))], self._tokenizer.im_end]

    def _stray(self, ids: list[int], draw: random.Random) -> list[int]:
        """Control tokens where none belong."""
        control = sorted(self._tokenizer.special.values())
        for _ in range(3):
            ids[draw.randrange(len(ids))] = draw.choice(control)
        return ids

    def _garbage(self, ids: list[int], draw: random.Random) -> list[int]:
        return [draw.randrange(self._tokenizer.vocab_size) for _ in ids]
