"""Where recorded calls stay."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from baltoro.rollout.gateway.graph import Call, Session


class Store(Protocol):
    async def save(self, session: Session, calls: Sequence[Call], files: Mapping[str, bytes]) -> None:
        """`calls`: the new ones. `files`: those of the dialogue's media, by hash. Returns when the calls are safe."""
        ...

    async def load(self, session: str) -> Session | None:
        """A session as it was saved, with all calls whose `save` was begun before."""
        ...

    async def files(self, session: Session) -> Mapping[str, bytes]:
        """Of all media in the session."""
        ...


class MemoryStore:
    """Keeps everything for as long as the process lives."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._files: dict[str, bytes] = {}

    async def save(self, session: Session, calls: Sequence[Call], files: Mapping[str, bytes]) -> None:
        self._sessions[session.id] = session
        for name, file in files.items():
            self._files.setdefault(name, file)

    async def load(self, session: str) -> Session | None:
        return self._sessions.get(session)

    async def files(self, session: Session) -> Mapping[str, bytes]:
        return self._files
