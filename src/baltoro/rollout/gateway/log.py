"""What was acknowledged and is not in the database yet: an append to a file is all that a request waits for."""

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_HEAD = struct.Struct("<QI")


class Log:
    """Records in a file that one process has to itself. They outlive the process, not a loss of power."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where another process has it."""
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise ValueError(f"{path.stem} is in use by another gateway; stop it or choose another file") from None
        self.size = os.fstat(self._fd).st_size

    def append(self, record: bytes) -> None:
        """All of it or nothing. Raises OSError where the disk does not take it."""
        data = _HEAD.pack(len(record), zlib.crc32(record)) + record
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError(f"{self._path}: no space left for a record of {len(data)} bytes")
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += len(data)

    def records(self) -> Iterator[bytes]:
        """From the beginning; one that was not written to its end was never acknowledged."""
        data = self._path.read_bytes()
        at = 0
        while at + _HEAD.size <= len(data):
            length, check = _HEAD.unpack_from(data, at)
            at += _HEAD.size
            record = data[at : at + length]
            if len(record) < length or zlib.crc32(record) != check:
                return
            yield record
            at += length

    def clear(self) -> None:
        os.ftruncate(self._fd, 0)
        self.size = 0

    def close(self) -> None:
        """Without records it leaves no file."""
        if not self.size:
            self._path.unlink()
        os.close(self._fd)
