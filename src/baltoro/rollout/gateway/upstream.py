"""Where the gateway's answers come from."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from baltoro.rollout.gateway.answer import Job, Step
from baltoro.rollout.gateway.chat_request import ChatRequest
from baltoro.rollout.gateway.dialogue import Dialogue
from baltoro.rollout.gateway.graph import Call, Place
from baltoro.rollout.gateway.rendering import Rendering
from baltoro.rollout.gateway.said import Setting


@dataclass(frozen=True, eq=False)
class Ask:
    """A request that was read. session: its id, empty where nothing is recorded. place: where its dialogue stands in
    the session, None where nothing is recorded; chain: the calls that it goes on from."""

    session: str
    dialect: str
    request: ChatRequest
    body: Mapping[str, Any]
    dialogue: Dialogue
    setting: Setting
    place: Place | None
    chain: Sequence[Call]


class Upstream(Protocol):
    @property
    def max_len(self) -> int:
        """Tokens of prompt and completion together."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the ids and log-probabilities that the model read and drew are known, and not the text alone."""
        ...

    @property
    def rendering(self) -> Rendering | None:
        """None where the model's media are not known here: then traces with media cannot be exported."""
        ...

    async def prepare(self, ask: Ask) -> Job:
        """Checks the request and makes its prompt. Raises ApiError 400."""
        ...

    def speak(self, ask: Ask, job: Job, index: int) -> AsyncGenerator[Step]:
        """Answer `index`. Closing the generator ends the work on it."""
        ...

    def spell(self, token: int) -> bytes:
        """Of a token that was drawn; control tokens by name."""
        ...
