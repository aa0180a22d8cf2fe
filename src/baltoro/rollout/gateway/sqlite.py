"""Recorded calls in an SQLite file. A request waits until its call is in a log; one thread brings what has come in the
last moments from the log into the database, so a thousand calls cost a few commits, none of them on the event loop.

A call that was saved survives the death of the process (kill -9): the next one to open the file reads the log that was
left. The loss of power may take the last moments, for neither log is synchronised to the disk at every commit.
"""

import asyncio
import contextlib
import io
import logging
import pickle
import sqlite3
import threading
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import orjson

from baltoro.chat.messages import ToolSpec
from baltoro.rollout.gateway.graph import Call, Prompt, Session
from baltoro.rollout.gateway.log import Log
from baltoro.rollout.gateway.said import Said, Setting

_logger = logging.getLogger(__name__)
_VERSION = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS calls (
  session TEXT, number INTEGER, first INTEGER, parent INTEGER, key BLOB,
  base INTEGER, same_said INTEGER, same_ids INTEGER, said BLOB, added BLOB, setting BLOB,
  ids BLOB, logprobs BLOB, versions BLOB, answer BLOB, finish TEXT, broke TEXT, dialect TEXT, started REAL, ended REAL,
  PRIMARY KEY (session, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS media (hash TEXT PRIMARY KEY, file BLOB);
"""


_GATHER_S = 0.02
_Row = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of calls and of media. saved: for whoever waits for the commit."""

    calls: list[_Row]
    media: list[tuple[str, bytes]]
    saved: "asyncio.Future[None] | None" = None


class SqliteStore:
    """A context: leaving it writes what is left and closes the file. One process may write to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[str] = set()
        self._readers = ThreadPoolExecutor(1, "gateway store reader")
        self._lock = threading.Lock()  # a call is in the log if and only if it waits here
        self._waiting: list[_Batch] = []
        self._committing: list[_Batch] = []
        self._come = threading.Event()
        self._hurry = threading.Event()
        self._closing = False
        self._failed = False

    def __enter__(self) -> Self:
        with contextlib.closing(self._connect()) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if connection.execute("PRAGMA schema_version").fetchone() != (0,) and version != _VERSION:
                raise ValueError(f"{self._path} was written by another version of the gateway; choose a new file")
            # One is written to while the other is brought into the database.
            self._log, self._other = (Log(self._path.with_name(f"{self._path.name}.log{i}")) for i in range(2))
            connection.execute(f"PRAGMA user_version={_VERSION}")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(_TABLES)
            for log in (self._log, self._other):
                # Of what a process left that died, some may have been committed.
                _insert(connection, [_Batch(*_plain(record)) for record in log.records()], "INSERT OR IGNORE")
                log.clear()
            self._known = {row[0] for row in connection.execute("SELECT hash FROM media")}
        self._writer = threading.Thread(target=self._write, name="gateway store")
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._hurry.set()
        self._come.set()
        self._writer.join()
        self._readers.shutdown()
        for log in (self._log, self._other):
            if not self._failed:
                log.clear()
            log.close()

    async def save(self, session: Session, calls: Sequence[Call], files: Mapping[str, bytes]) -> None:
        """Raises OSError or sqlite3.Error where the disk does not take it."""
        media = [(name, file) for name, file in files.items() if name not in self._known]
        rows = [_row(session.id, call) for call in calls]
        record = pickle.dumps((rows, media))
        with self._lock:
            self._log.append(record)
            self._waiting.append(_Batch(rows, media))
        self._known.update(name for name, _ in media)
        self._come.set()
        if self._failed:
            await self._committed()

    async def load(self, session: str) -> Session | None:
        # Somebody may have begun to save and left without waiting for it.
        with self._lock:
            under_way = [*self._committing, *self._waiting]
        if any(row[0] == session for batch in under_way for row in batch.calls):
            await self._committed()
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._load, session)

    async def files(self, session: Session) -> Mapping[str, bytes]:
        await self._committed()
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._files, session)

    async def _committed(self) -> None:
        """All that has come. Raises sqlite3.Error."""
        saved = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append(_Batch([], [], saved))
        self._hurry.set()
        self._come.set()
        await saved

    def _load(self, session: str) -> Session | None:
        with contextlib.closing(self._connect()) as connection:
            rows = connection.execute("SELECT * FROM calls WHERE session = ? ORDER BY number", (session,)).fetchall()
        if not rows:
            return None
        found = Session(session)
        for row in rows:
            found.restore(_call(row, found))
        return found

    def _files(self, session: Session) -> Mapping[str, bytes]:
        names = {media.hash for call in session.calls for one in call.prompt.said for media in one.media}
        with contextlib.closing(self._connect()) as connection:
            rows = [connection.execute("SELECT hash, file FROM media WHERE hash = ?", (name,)) for name in names]
            return dict(row.fetchone() for row in rows)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60)

    def _write(self) -> None:
        connection = self._connect()
        connection.execute("PRAGMA synchronous=NORMAL")
        # The log is brought into the file, and both to the disk, every 64 MB, not every 4.
        connection.execute("PRAGMA wal_autocheckpoint=16384")
        closing = False
        while not closing:
            self._come.wait()
            self._hurry.wait(_GATHER_S)
            with self._lock:
                self._come.clear()
                self._hurry.clear()
                closing = self._closing
                self._committing += self._waiting
                self._waiting = []
                self._log, self._other = self._other, self._log
            error = self._commit(connection, self._committing)
            self._failed = error is not None
            _tell(self._committing, error)
            if error is None:
                self._committing = []
                self._other.clear()
            else:
                _logger.error("%s takes no more calls (%s); they wait in %s.log*", self._path, error, self._path.name)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, batches: Sequence[_Batch]) -> sqlite3.Error | None:
        try:
            _insert(connection, batches, "INSERT")
        except sqlite3.Error as error:
            return error
        return None


class _Plain(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"the log names {module_name}.{global_name}, which no gateway wrote; remove it")


def _plain(record: bytes) -> Any:
    """Lists, tuples, texts, numbers and bytes. A log that came with somebody else's file runs no code."""
    return _Plain(io.BytesIO(record)).load()


def _insert(connection: sqlite3.Connection, batches: Sequence[_Batch], verb: str) -> None:
    """All or nothing."""
    with connection:
        media = (one for batch in batches for one in batch.media)
        connection.executemany("INSERT OR IGNORE INTO media VALUES (?, ?)", media)
        rows = (row for batch in batches for row in batch.calls)
        connection.executemany(f"{verb} INTO calls VALUES ({', '.join('?' * 20)})", rows)


def _tell(batches: Sequence[_Batch], error: sqlite3.Error | None) -> None:
    """Wakes all who wait, with one call for each event loop."""

    def wake(waiting: Sequence["asyncio.Future[None]"]) -> None:
        for saved in waiting:
            if saved.done():
                continue
            if error is None:
                saved.set_result(None)
            else:
                saved.set_exception(error)

    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for batch in batches:
        if batch.saved is not None:
            loops.setdefault(batch.saved.get_loop(), []).append(batch.saved)
    for loop, waiting in loops.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake, waiting)


def _row(session: str, call: Call) -> tuple[Any, ...]:
    """What a prompt adds to its base stands with the first call that asked it alone, and the tools with the beginning
    alone."""
    prompt = call.prompt
    first = prompt.first == call.number
    said = orjson.dumps([one.to_json() for one in prompt.new_said]) if first else None
    setting = None
    if first and prompt.parent is None:
        setting = orjson.dumps([call.setting.thinking, call.setting.tools_json()])
    return (
        session,
        call.number,
        prompt.first,
        prompt.parent,
        prompt.key,
        prompt.base.first if prompt.base else None,
        prompt.same_said,
        prompt.same_ids,
        said,
        prompt.new_ids.tobytes() if first else None,
        setting,
        call.ids.tobytes(),
        call.logprobs.tobytes(),
        call.versions.tobytes(),
        orjson.dumps(call.answer.to_json()),
        call.finish,
        call.broke,
        call.dialect,
        call.started,
        call.ended,
    )


def _call(row: Sequence[Any], found: Session) -> Call:
    number, first = cast(int, row[1]), cast(int, row[2])
    parent, base = cast(int | None, row[3]), cast(int | None, row[5])
    key, _, same_said, same_ids, said, added, setting, ids, logprobs, versions, answer, *rest = row[4:]
    if first == number:
        shared = None if base is None else found.calls[base].prompt
        new = tuple(Said.from_json(one) for one in orjson.loads(said))
        prompt = Prompt(key, parent, number, shared, same_said, same_ids, new, array("i", added))
    else:
        prompt = found.calls[first].prompt
    if setting is not None:
        thinking, tools = orjson.loads(setting)
        set_up = Setting(tuple(ToolSpec(*tool) for tool in tools), thinking)
    else:
        set_up = found.calls[first if parent is None else parent].setting
    drawn = array("i", ids), array("d", logprobs), array("i", versions)
    return Call(number, prompt, set_up, *drawn, Said.from_json(orjson.loads(answer)), *rest)
