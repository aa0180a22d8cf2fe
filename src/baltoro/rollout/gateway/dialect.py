"""What a dialect does: one way to ask for an answer over HTTP and to be told it."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import orjson

from baltoro.rollout.gateway.answer import Choice, Job, Step
from baltoro.rollout.gateway.chat_request import ChatRequest
from baltoro.rollout.gateway.errors import ApiError

Spell = Callable[[int], bytes]
"""The bytes of a token; control tokens by name."""


class Stream(Protocol):
    """Server-sent events of one request, in the order in which they are sent."""

    def step(self, choice: Choice, step: Step) -> bytes:
        """`step` has been added to `choice`. Empty where there is nothing to tell yet."""
        ...

    def end(self, choices: Sequence[Choice]) -> bytes: ...

    def error(self, body: dict[str, Any]) -> bytes:
        """What ends a stream that cannot go on; `body` as the dialect writes errors."""
        ...


class Dialect(Protocol):
    @property
    def name(self) -> str: ...

    def read(self, body: dict[str, Any]) -> ChatRequest:
        """Raises ApiError 400."""
        ...

    def whole(self, request: ChatRequest, job: Job, choices: Sequence[Choice], spell: Spell) -> dict[str, Any]: ...

    def stream(self, request: ChatRequest, job: Job, spell: Spell) -> Stream: ...

    def error(self, error: ApiError) -> dict[str, Any]: ...


def event(body: dict[str, Any], name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(body) + b"\n\n"


def fresh() -> str:
    """24 hexadecimal digits that name something; nobody has to guess them."""
    return f"{random.getrandbits(96):024x}"
