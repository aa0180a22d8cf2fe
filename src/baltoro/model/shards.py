"""Safetensors files that are read and written piece by piece, and the checksums beside them.

The safetensors package writes a file from tensors that are all in memory; a shard of the release has 10 GB, in bfloat16
34 GB. The format is simple: eight bytes of header length, a JSON header with dtype, shape and place of each tensor,
then the data.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

# In the order in which they stand in a file; within a dtype by name. So the released files are laid out.
_DTYPES = {"F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(tensors: Mapping[str, Stored]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor begins."""
    rank = {dtype: i for i, dtype in enumerate(_NAMES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].size
        entries[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + entries[name]["data_offsets"][0] for name in order}


class ShardReader:
    """One file. Raises ValueError that names it if it is truncated or no safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self._begin: dict[str, int] = {}
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(size - 8, _LARGEST_HEADER):
                    raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
                entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            end = 8 + length
            for name, entry in entries.items():
                if entry["dtype"] not in _DTYPES:
                    raise ValueError(f"{name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
                stored = self.tensors[name] = Stored(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
                begin, last = entry["data_offsets"]
                if last - begin != stored.size or begin < 0:
                    raise ValueError(f"{name} has {last - begin} bytes, its shape {stored.size}")
                self._begin[name] = 8 + length + begin
                end = max(end, 8 + length + last)
            if end != size:
                raise ValueError(f"it has {size:,} bytes of {end:,}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: truncated or no safetensors file ({error}); fetch it again") from None

    def read(self, name: str, at: int, shape: tuple[int, ...]) -> Tensor:
        """As many elements of a tensor as `shape` holds, from element `at` on, in a buffer of their own."""
        dtype = self.tensors[name].dtype
        buffer = bytearray(math.prod(shape) * dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(self._begin[name] + at * dtype.itemsize)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{self.path}: truncated while it was read; fetch it again")
        return torch.frombuffer(buffer, dtype=dtype).view(shape)


class ShardWriter:
    """One file, filled in any order; on leaving the context it is whole and on the disk."""

    def __init__(self, path: Path, tensors: Mapping[str, Stored]):
        self._tensors = tensors
        head, self._begin = header(tensors)
        self._missing = sum(stored.size for stored in tensors.values())
        self._file = path.open("wb", buffering=0)
        self._write(memoryview(head))

    def __enter__(self) -> Self:
        return self

    def put(self, name: str, values: Tensor, at: int = 0) -> None:
        """Places elements of a tensor, from element `at` on."""
        dtype = self._tensors[name].dtype
        self._file.seek(self._begin[name] + at * dtype.itemsize)
        values = values.to("cpu", dtype).contiguous()
        self._write(values.view(-1).view(torch.uint8).numpy().data)
        self._missing -= values.nbytes

    def _write(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            error.filename = self._file.name
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                assert self._missing == 0, f"{self._missing} bytes were not written"
                os.fsync(self._file.fileno())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """File name -> sha256 in hex, from `SHA256SUMS`, which `sha256sum -c` reads too; empty if there is none."""
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines()]
    if any(len(line) != 2 or len(line[0]) != 64 for line in lines):
        raise ValueError(f"{path}: expected lines of a sha256 and a file name; delete it to go without checksums")
    return {name.removeprefix("*"): digest for digest, name in lines}


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    write_whole(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def write_whole(path: Path, text: str) -> None:
    """At any moment `path` is whole, old or new."""
    scratch = path.with_name(path.name + ".writing")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
