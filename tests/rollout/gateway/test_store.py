"""The store's log: what a request waits for, when the disk or the process fails."""

import contextlib
import os
import pickle
import resource
import sqlite3
from array import array
from collections.abc import Generator
from pathlib import Path

import pytest

from baltoro.rollout.gateway.answer import Drawn
from baltoro.rollout.gateway.graph import Call, Session
from baltoro.rollout.gateway.log import Log
from baltoro.rollout.gateway.said import Said, Setting
from baltoro.rollout.gateway.sqlite import SqliteStore

SETTING = Setting((), True)


def another(session: Session) -> Call:
    said = [Said("user", (f"{len(session.calls)}",))]
    drawn = Drawn(array("i", [2]), array("d", [-1.0]), array("i", [0]))
    place = session.place(SETTING, said)
    answer = Said("assistant", ("x",))
    return session.add(place, SETTING, said, array("i", [1]), drawn, answer, "stop", "chat", 0.0, 1.0)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Generator[None]:
    """A disk that is full for every file that would grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_of_a_torn_log_whole_records_are_read(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    for record in (b"first", b"", b"third"):
        log.append(record)
    data = (tmp_path / "log").read_bytes()
    ends = [12 + 5, 12 + 5 + 12, len(data)]  # a head of 12 bytes before each
    for size in range(len(data) + 1):
        (tmp_path / "log").write_bytes(data[:size])
        assert list(log.records()) == [b"first", b"", b"third"][: sum(end <= size for end in ends)]
    (tmp_path / "log").write_bytes(data[:-1] + b"!")  # another letter where the last should be
    assert list(log.records()) == [b"first", b""]


def test_a_record_that_the_disk_does_not_take_leaves_the_log_whole(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    log.append(b"first")
    with files_of_at_most(200), pytest.raises(OSError, match=r"large|space"):
        log.append(b"x" * 1000)
    log.append(b"second")
    assert list(log.records()) == [b"first", b"second"]


async def test_calls_wait_in_the_log_while_the_database_takes_none(tmp_path: Path) -> None:
    session, file = Session("s"), tmp_path / "calls.db"
    with SqliteStore(file) as store:
        await store.save(session, [another(session)], {})
        await store.files(session)  # it is in the database now
        with files_of_at_most((tmp_path / "calls.db-wal").stat().st_size):
            await store.save(session, [another(session)], {})
            with pytest.raises(sqlite3.Error):
                await store.files(session)
            with pytest.raises(sqlite3.Error):
                await store.save(session, [another(session)], {})
        await store.save(session, [another(session)], {})
        found = await store.load("s")
    assert found is not None
    assert [call.prompt.said[0].content[0] for call in found.calls] == ["0", "1", "2", "3"]
    assert [path.name for path in tmp_path.iterdir()] == ["calls.db"]


async def test_what_a_store_could_not_commit_is_there_for_the_next(tmp_path: Path) -> None:
    session, file = Session("s"), tmp_path / "calls.db"
    with contextlib.ExitStack() as disk, SqliteStore(file) as store:
        await store.save(session, [another(session)], {})
        await store.files(session)
        disk.enter_context(files_of_at_most((tmp_path / "calls.db-wal").stat().st_size))
        await store.save(session, [another(session)], {"hash": b"png"})
        with pytest.raises(sqlite3.Error):
            await store.files(session)
    with SqliteStore(file) as store:
        found = await store.load("s")
        assert found is not None
        assert len(found.calls) == 2
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT * FROM media").fetchall() == [("hash", b"png")]


def test_a_file_belongs_to_one_store(tmp_path: Path) -> None:
    with (
        SqliteStore(tmp_path / "calls.db"),
        pytest.raises(ValueError, match=r"calls\.db is in use by another gateway"),
        SqliteStore(tmp_path / "calls.db"),
    ):
        pass
    with SqliteStore(tmp_path / "calls.db"):
        pass


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_strangers_log_runs_no_code(tmp_path: Path) -> None:
    log = Log(tmp_path / "calls.db.log0")
    log.append(pickle.dumps(([], [Evil(tmp_path / "made")])))
    log.close()
    with pytest.raises(ValueError, match="no gateway wrote"), SqliteStore(tmp_path / "calls.db"):
        pass
    assert not (tmp_path / "made").exists()
