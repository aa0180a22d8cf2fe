"""What was read last in each session. Agents send their whole history with every request; the part that stands as it
stood is compared, not read, decoded and digested again, so that a turn costs what it adds (and a comparison)."""

from collections.abc import Sequence
from dataclasses import dataclass

from baltoro.rollout.gateway.chat_request import AnyTurn
from baltoro.rollout.gateway.dialogue import Dialogue


@dataclass(frozen=True, eq=False)
class Heard:
    """keys: of each beginning of the dialogue, as the session's graph knows it."""

    turns: Sequence[AnyTurn]
    dialogue: Dialogue
    setting: bytes
    keys: Sequence[bytes]

    def same(self, turns: Sequence[AnyTurn]) -> int:
        """How many turns stand as they stood."""
        pairs = zip(self.turns, turns, strict=False)
        return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.turns), len(turns)))
