"""The boundary between agents and models: token ids in, token ids with log-probabilities out (appendix D)."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from baltoro.chat.messages import TokenSequence


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a completion. `temperature` 0 is greedy. `seed` makes the draw independent of batch-mates."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids (the stop token included when it was drawn) and the log-probability of each under the
    distribution it was drawn from the model at temperature 1 (the engine_logprobs of Eq. 1)."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int


class Sampled(NamedTuple):
    """One token of a completion as it is drawn, with its log-probability at temperature 1, and by which weights."""

    token: int
    logprob: float
    weight_version: int = 0


class Overloaded(Exception):
    """The engine has too much to do and took nothing on (HTTP 429). It asks to be left alone for `retry_after_s`."""

    def __init__(self, retry_after_s: float = 0.0) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the engine is overloaded, retry after {self.retry_after_s:g} s"


class Engine(Protocol):
    """Anything that continues a token sequence. Stops at <|im_end|> or after `max_tokens`.

    An agent's prompt grows in place after the call: an engine copies what it keeps."""

    async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
        """`role` names the policy that speaks (orchestrator, subagent, ...), so that one engine may serve several.

        Raises Overloaded, ConnectionError or TimeoutError for what another attempt may cure."""
        ...


class StreamingEngine(Protocol):
    """An engine that hands each token over as it is drawn."""

    def stream(self, prompt: TokenSequence, sampling: Sampling, role: str) -> AsyncGenerator[Sampled]:
        """The tokens of `generate`, the stop token included. Closing the generator ends the work on the request."""
        ...
