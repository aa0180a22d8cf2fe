"""What was read last in each session. Agents send their whole history with every request; the part that stands as it
stood is compared, not read, decoded and digested again, so that a turn costs what it adds (and a comparison)."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from baltoro.rollout.gateway.chat_request import AnyTurn
from baltoro.rollout.gateway.dialogue import Dialogue

_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Heard:
    """keys: of each beginning of the dialogue, as the session's graph knows it. size: bytes of the request."""

    turns: Sequence[AnyTurn]
    dialogue: Dialogue
    setting: bytes
    keys: Sequence[bytes]
    size: int

    def same(self, turns: Sequence[AnyTurn]) -> int:
        """How many turns stand as they stood."""
        pairs = zip(self.turns, turns, strict=False)
        return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.turns), len(turns)))


class Hearing:
    """Within 256 MB of requests; the session that was silent longest is forgotten first."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, Heard] = OrderedDict()
        self._held = 0

    def last(self, session: str) -> Heard | None:
        return self._last.get(session)

    def keep(self, session: str, heard: Heard) -> None:
        old = self._last.pop(session, None)
        self._held += heard.size - (old.size if old else 0)
        self._last[session] = heard
        while self._held > _BYTES:
            self._held -= self._last.popitem(last=False)[1].size
