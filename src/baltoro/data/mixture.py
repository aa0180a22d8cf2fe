"""Which example comes when: a pure function of (seed, step), so that resuming needs one integer and nothing else."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from baltoro.chat.messages import TokenSequence

Source = Callable[[random.Random], TokenSequence]

_WEIGHED = 32
"""Examples of each source whose lengths decide how often it is drawn."""


@dataclass(frozen=True)
class Mixture:
    """`sources` builds the sources of one step (they may share that step's world); `shares` are shares of tokens, not
    of examples. A batch holds at least `tokens_per_batch` tokens. Every example is drawn by itself, so the ratio is
    constant over steps however small a batch is; one batch alone may be off by some examples."""

    sources: Callable[[random.Random], Mapping[str, Source]]
    shares: Mapping[str, float]
    tokens_per_batch: int
    seed: int

    def batch(self, step: int) -> list[TokenSequence]:
        """The examples of one step."""
        rng = random.Random(f"{self.seed} {step}")
        sources = self.sources(rng)
        names, tokens = list(self.shares), 0
        out: list[TokenSequence] = []
        while tokens < self.tokens_per_batch:
            (name,) = rng.choices(names, self._odds)
            out.append(sources[name](rng))
            tokens += len(out[-1].ids)
        return out

    @cached_property
    def _odds(self) -> list[float]:
        """Share by length: so that tokens, not examples, are drawn in proportion to the shares."""
        rng = random.Random("lengths")
        lengths = Counter[str]()
        for _ in range(_WEIGHED):
            sources = self.sources(rng)
            for name in self.shares:
                lengths[name] += len(sources[name](rng).ids)
        return [share / lengths[name] for name, share in self.shares.items()]
