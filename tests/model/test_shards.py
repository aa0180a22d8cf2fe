"""Our reader and writer against the safetensors package, and against files that are no such thing."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from baltoro.model.shards import ShardReader, ShardWriter, Stored

TENSORS = {
    "b": torch.arange(15, dtype=torch.bfloat16).view(3, 5),
    "a": torch.tensor([1.5, -2.0, float("inf")]),
    "c": torch.arange(8, dtype=torch.int32).view(2, 2, 2),
    "a.b": torch.tensor([3.0], dtype=torch.bfloat16),
}
STORED = {name: Stored(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


def _write(path: Path, prefix: str = "") -> None:
    with ShardWriter(path, {prefix + name: stored for name, stored in STORED.items()}) as writer:
        for name, tensor in reversed(TENSORS.items()):
            writer.put(prefix + name, tensor)


@pytest.mark.parametrize("length", range(8))
def test_a_file_is_byte_for_byte_that_of_the_safetensors_package(length: int, tmp_path: Path) -> None:
    prefix = "p" * length
    _write(tmp_path / "ours.safetensors", prefix)
    save_file({prefix + name: tensor for name, tensor in TENSORS.items()}, tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_pieces_go_and_come_by_element(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, {"x": Stored(torch.bfloat16, (4, 3)), "y": Stored(torch.float32, (2,))}) as writer:
        writer.put("x", torch.tensor([[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]), at=6)
        writer.put("y", torch.tensor([0.1, 0.2]))
        writer.put("x", torch.arange(1, 7), at=0)
    assert torch.equal(load_file(path)["x"], torch.arange(1, 13, dtype=torch.bfloat16).view(4, 3))
    assert ShardReader(path).read("x", 3, (2, 3)).tolist() == [[4, 5, 6], [7, 8, 9]]
    assert ShardReader(path).read("y", 1, (1,)).tolist() == [torch.tensor(0.2).item()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path, data: st.DataObject) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    _write(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated or no safetensors file \(.+\); fetch it again"):
        ShardReader(cut)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,2]}}', "x has 2 bytes, its shape 4"),
        ('{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}', "x has dtype F8_E4M3"),
        ('{"x":{"dtype":"BF16","shape":[1],"data_offsets":[-2,0]}}', "x has 2 bytes"),
        ('{"x":{"dtype":"BF16","shape":[1]}}', "data_offsets"),
        ("[1]", "truncated or no"),
        ("{", "truncated or no"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, entry: str, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(entry).to_bytes(8, "little") + entry.encode() + b"\0\0")
    with pytest.raises(ValueError, match=says):
        ShardReader(path)


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="4,611,686,018,427,387,904 bytes in a file of 10"):
        ShardReader(path)
