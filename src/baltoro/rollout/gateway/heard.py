"""What was read last in each session. Agents send their whole history with every request; the part that stands as it
stood is compared, not read, decoded and digested again, so that a turn costs what it adds (and a comparison)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from baltoro.rollout.gateway.chat_request import AnyTurn
from baltoro.rollout.gateway.dialogue import Dialogue


@dataclass(frozen=True, eq=False)
class Heard:
    """told: the messages as they came in a chat completion; empty where another dialect told them. keys: of each
    beginning of the dialogue, as the session's graph knows it."""

    told: Sequence[Any]
    turns: Sequence[AnyTurn]
    dialogue: Dialogue
    setting: bytes
    keys: Sequence[bytes]

    def known(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion's `body` with turns in the place of the messages that stand as they stood, so that they
        are not checked again."""
        messages = body.get("messages")
        if not isinstance(messages, list):
            return dict(body)
        count = _common(self.told, cast(list[Any], messages))
        return {**body, "messages": [*self.turns[:count], *messages[count:]]}

    def same(self, turns: Sequence[AnyTurn]) -> int:
        """How many turns stand as they stood."""
        return _common(self.turns, turns)


def _common(old: Sequence[Any], new: Sequence[Any]) -> int:
    pairs = zip(old, new, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a is not b and a != b), min(len(old), len(new)))
