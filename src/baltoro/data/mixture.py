"""Which example comes when: a pure function of (seed, step), so that resuming needs one integer and nothing else."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from baltoro.chat.messages import TokenSequence

Source = Callable[[random.Random], TokenSequence]


@dataclass(frozen=True)
class Mixture:
    """`sources` builds the sources of one step (they may share that step's world); `shares` are shares of tokens, not
    of examples. A batch holds at least `tokens_per_batch` tokens."""

    sources: Callable[[random.Random], Mapping[str, Source]]
    shares: Mapping[str, float]
    tokens_per_batch: int
    seed: int

    def batch(self, step: int) -> list[TokenSequence]:
        """The examples of one step; the source furthest behind its share goes next, so the ratio stays constant."""
        rng = random.Random(f"{self.seed} {step}")
        sources = self.sources(rng)
        taken = dict.fromkeys(self.shares, 0)
        out: list[TokenSequence] = []
        while sum(taken.values()) < self.tokens_per_batch:
            name = min(self.shares, key=lambda s: (taken[s] + 1) / self.shares[s])
            example = sources[name](rng)
            taken[name] += len(example.ids)
            out.append(example)
        return out
