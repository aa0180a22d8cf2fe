"""What outlives the process: the answers that episodes got, and which step trains on which episode (appendix D)."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS records (episode TEXT, key BLOB, value BLOB, PRIMARY KEY (episode, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (episode TEXT PRIMARY KEY, step INTEGER) WITHOUT ROWID;
"""
_WRITE = "INSERT OR REPLACE INTO records VALUES (?, ?, ?)"
_CLAIM = "INSERT INTO claims VALUES (?, ?)"
_FORGET_UNCLAIMED = "DELETE FROM records WHERE episode NOT IN (SELECT episode FROM claims)"
_FORGET = "DELETE FROM records WHERE episode IN (SELECT episode FROM claims WHERE step < ?)"


class Journal:
    """One SQLite file, of one process at a time. All its work is done on a thread, many writes in one commit.

    claims: for every episode that a step trains on, that step. It is set once and stands for ever: whoever keeps the
    number of the next step with the weights (so that both are lost or kept together) trains on every episode exactly
    once, if he takes up a step's claims again whenever he begins that step again.
    """

    def __init__(self, db: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._db = db
        self._thread = thread
        self._known = {episode for (episode,) in db.execute("SELECT DISTINCT episode FROM records")}
        self.claims: dict[str, int] = dict(db.execute("SELECT episode, step FROM claims"))
        self._pending: list[tuple[str, tuple[object, ...]]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._wake = asyncio.Event()
        self._closing = False

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path) -> AsyncGenerator[Self]:
        """Leaving it waits until everything is on the disk. An error of the disk cancels what happens within it."""
        with (
            ThreadPoolExecutor(1, "journal") as thread,
            contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as db,
        ):
            db.executescript(_SCHEMA)
            journal = cls(db, thread)
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(journal._write())
                try:
                    yield journal
                finally:
                    journal._closing = True
                    journal._wake.set()
                    await asyncio.wait([writing])  # leaving by an exception cancels it otherwise

    @property
    def episodes(self) -> Set[str]:
        """Those that something was put down for, also if it was forgotten since."""
        return self._known

    async def records(self, episode: str) -> dict[bytes, bytes]:
        """By key, all that was put down for an episode."""
        if episode not in self._known:
            return {}
        await self.written()
        query = "SELECT key, value FROM records WHERE episode = ?"
        run = asyncio.get_running_loop().run_in_executor
        return dict(await run(self._thread, lambda: self._db.execute(query, (episode,)).fetchall()))

    def put(self, episode: str, key: bytes, value: bytes) -> None:
        """Survives the end of the process within moments, or once `written` has returned."""
        self._known.add(episode)
        self._add(_WRITE, (episode, key, value))

    async def claim(self, step: int, episodes: Iterable[str]) -> None:
        """These episodes are for this step alone; that is on the disk when it returns."""
        for episode in episodes:
            assert episode not in self.claims, f"step {self.claims[episode]} trains on {episode}"
            self.claims[episode] = step
            self._add(_CLAIM, (episode, step))
        await self.written()

    def forget(self, step: int) -> None:
        """Drops the records of episodes that steps before this one trained on; their claims stay."""
        self._add(_FORGET, (step,))

    def forget_unclaimed(self) -> None:
        """Drops all that is known of episodes that no step trains on yet."""
        self._known &= self.claims.keys()
        self._add(_FORGET_UNCLAIMED, ())

    async def written(self) -> None:
        """Returns when all that was put down before is on the disk."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._wake.set()
        await done

    def _add(self, statement: str, values: tuple[object, ...]) -> None:
        self._pending.append((statement, values))
        self._wake.set()

    async def _write(self) -> None:
        while not self._closing or self._pending:
            await self._wake.wait()
            self._wake.clear()
            batch, self._pending = self._pending, []
            waiting, self._waiting = self._waiting, []
            if batch:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, batch)
            for each in waiting:
                if not each.done():
                    each.set_result(None)

    def _commit(self, batch: list[tuple[str, tuple[object, ...]]]) -> None:
        self._db.execute("BEGIN")
        for statement, values in batch:
            self._db.execute(statement, values)
        self._db.execute("COMMIT")
