"""What was put down is there when the file is opened again."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from baltoro.rollout.journal import Journal


async def test_all_that_was_put_down_is_there_again(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j") as journal:
        for i in range(1000):
            journal.put(f"e{i % 10}", bytes([i % 256, i // 256]), b"%d" % i)
        journal.put("e0", bytes([0, 0]), b"newer")
    async with Journal.open(tmp_path / "j") as journal:
        records = await journal.records("e0")
        assert len(records) == 100
        assert records[bytes([0, 0])] == b"newer"
        assert records[bytes([990 % 256, 990 // 256])] == b"990"
        assert await journal.records("e10") == {}


async def test_records_are_read_behind_those_not_yet_on_the_disk(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j") as journal:
        for i in range(50):
            journal.put("e", bytes([i]), b"x")
            assert len(await journal.records("e")) == i + 1


async def test_written_means_that_another_process_could_read_it(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j") as journal:
        journal.put("e", b"k", b"v")
        await journal.written()
        with sqlite3.connect(tmp_path / "j") as other:
            assert other.execute("SELECT value FROM records").fetchall() == [(b"v",)]
        other.close()


async def test_what_was_put_down_before_a_cancellation_is_there_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with Journal.open(tmp_path / "j") as journal:
            for i in range(1000):
                journal.put("e", b"%d" % i, b"x")
            put.set()
            await asyncio.sleep(1e6)

    put = asyncio.Event()
    task = asyncio.create_task(work())
    await put.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with Journal.open(tmp_path / "j") as journal:
        assert len(await journal.records("e")) == 1000


async def test_an_episode_is_claimed_once_and_its_records_go_when_it_was_trained_on(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j") as journal:
        for episode in ("a", "b", "c"):
            journal.put(episode, b"k", b"v")
        await journal.claim(3, ["a"])
        await journal.claim(4, ["b"])
        with pytest.raises(AssertionError, match="step 3 trains on a"):
            await journal.claim(4, ["a"])
    async with Journal.open(tmp_path / "j") as journal:
        assert journal.claims == {"a": 3, "b": 4}
        journal.forget(4)
        assert [len(await journal.records(episode)) for episode in ("a", "b", "c")] == [0, 1, 1]
    async with Journal.open(tmp_path / "j") as journal:
        assert journal.claims == {"a": 3, "b": 4}


async def test_an_error_of_the_disk_ends_what_relies_on_it(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as failed:
        async with Journal.open(tmp_path / "j") as journal:
            with sqlite3.connect(tmp_path / "j") as other:
                other.execute("DROP TABLE records")
            other.close()
            journal.put("e", b"k", b"v")
            await journal.written()
    assert failed.group_contains(sqlite3.OperationalError, match="no such table")
