"""Conversion as a user meets it: real folders, a memory limit of the kernel's, kill -9, flipped bytes, a full disk."""

import dataclasses
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from baltoro import cli
from baltoro.model.config import NANO, ModelConfig
from baltoro.model.convert import FORMATS, convert, save_release
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25
from baltoro.model.layout import weights
from baltoro.model.release import Checkpoint, load_release
from baltoro.model.shards import read_checksums, sha256, write_checksums

EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"


def _model(config: ModelConfig = NANO, seed: int = 0) -> KimiK25:
    model = KimiK25(config, media_pad=1000)
    initialise(model, torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> KimiK25:
    return _model()


@pytest.fixture(scope="module")
def bf16(model: KimiK25, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "bf16"
    save_release(model, folder, "bf16")
    return folder


@pytest.fixture
def source(bf16: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(bf16, tmp_path / "source"))


def _tensor(folder: Path, name: str) -> torch.Tensor:
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(folder / file, framework="pt") as opened:
        return opened.get_tensor(name)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def _sums(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in read_checksums(folder).items() if name.endswith(".safetensors")}


def test_a_saved_model_is_loaded_again(model: KimiK25, bf16: Path) -> None:
    again = _model(seed=1)
    load_release(bf16, again)
    for (name, ours), back in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        exact = ours if name.endswith("bias") and "e_score" in name else ours.bfloat16().float()
        assert torch.equal(back, exact), name
    assert torch.equal(_tensor(bf16, EXPERT), weights(model)[EXPERT].bfloat16())


def test_int4_is_read_as_its_definition_says(model: KimiK25, tmp_path: Path) -> None:
    """Against numpy on the stored numbers: q = nibble - 8, w = q * scale, 32 weights to a scale along the input."""
    save_release(model, tmp_path / "int4", "int4")
    packed = _tensor(tmp_path / "int4", EXPERT + "_packed").numpy().view(np.uint32)
    scale = _tensor(tmp_path / "int4", EXPERT + "_scale").float().numpy()
    assert _tensor(tmp_path / "int4", EXPERT + "_shape").tolist() == [128, 128]
    steps = ((packed[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15).astype(int).reshape(128, 128) - 8
    expected = torch.from_numpy((steps * np.repeat(scale, 32, axis=1)).astype(np.float32))
    again = _model(seed=1)
    load_release(tmp_path / "int4", again)
    loaded = weights(again)[EXPERT]
    assert torch.equal(loaded, expected)
    assert ((loaded - weights(model)[EXPERT]).abs() <= torch.from_numpy(np.repeat(scale, 32, axis=1)) / 2).all()


def test_there_and_back_is_the_same_file_by_every_way(bf16: Path, tmp_path: Path) -> None:
    """bf16 through hf; INT4 through bf16, through hf, and hf from either: all checksums agree."""
    for source, target, form in [
        (bf16, "hf", "hf"),
        ("hf", "bf16", "bf16"),
        (bf16, "int4", "int4"),
        ("hf", "int4-hf", "int4"),
        ("int4", "bf16-int4", "bf16"),
        ("bf16-int4", "int4-again", "int4"),
        ("int4", "hf-int4", "hf"),
        ("hf-int4", "int4-hf-again", "int4"),
    ]:
        assert convert(tmp_path / source, tmp_path / target, form) == []
    assert read_checksums(tmp_path / "bf16") == read_checksums(bf16)
    for folder in ("int4-hf", "int4-again", "int4-hf-again"):
        assert read_checksums(tmp_path / folder) == read_checksums(tmp_path / "int4")


def test_a_larger_checkpoint_than_memory_is_converted_killed_half_way_and_resumed(tmp_path: Path) -> None:
    """RLIMIT_DATA allows the whole process, Python and torch included, 300 MiB; the checkpoint has 460 MB, and one
    tensor of 134 MB would not fit beside them."""
    text = dataclasses.replace(
        NANO.text, hidden_size=512, moe_intermediate_size=512, n_routed_experts=24, num_layers=6, vocab_size=131072
    )
    with torch.device("meta"):
        model = KimiK25(ModelConfig(text, NANO.vision), media_pad=1000)
    model.to(torch.bfloat16).to_empty(device="cpu")
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(noise.roll(7919 * i).repeat(-(-tensor.numel() // len(noise)))[: tensor.numel()].view(tensor.shape))
    source, target = tmp_path / "source", tmp_path / "target"
    save_release(model, source, "bf16")
    del model
    limit = 300 * 2**20
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 1.4 * limit

    command = [sys.executable, "-m", "baltoro.cli", "convert", str(source), str(target), "--to", "int4"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )

    with start() as process:
        while len(_sums(target)) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finished = {name: (target / name).stat() for name in _sums(target)}
    assert len(finished) < 9
    assert not (target / "config.json").exists()

    with start() as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "left" in said or "done" in said
    for name, before in finished.items():
        after = (target / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), f"{name} was written twice"
    assert all(sha256(target / name) == digest for name, digest in read_checksums(target).items())
    assert len(_sums(target)) == 9
    old, new = Checkpoint(source), Checkpoint(target)
    for name, shape in old.shapes.items():
        if ".experts." not in name:
            assert torch.equal(new.read(name, 0, shape[0]), old.read(name, 0, shape[0])), name
        elif ".experts.7." in name or ".experts.23." in name:
            # Normal noise: the largest of 32 is some 2 to 4, half a scale some 0.2.
            error = (new.read(name, 0, shape[0]) - old.read(name, 0, shape[0])).abs().max()
            assert 0.05 < error < 0.5, name


def test_a_flipped_byte_in_the_source_is_found_and_named(source: Path, tmp_path: Path) -> None:
    file = source / "model-00003-of-000007.safetensors"
    _flip(file, file.stat().st_size - 1000)
    with pytest.raises(ValueError, match=r"model-00003-of-000007\.safetensors: damaged, its checksum"):
        convert(source, tmp_path / "int4", "int4")
    assert len(_sums(tmp_path / "int4")) == 2
    # Fetched anew, the conversion goes on.
    _flip(file, file.stat().st_size - 1000)
    convert(source, tmp_path / "int4", "int4")
    assert len(_sums(tmp_path / "int4")) == 7


def test_a_flipped_byte_in_the_target_is_found_named_and_mended(
    bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(bf16), str(tmp_path / "int4"), "--to", "int4"]
    assert cli.main(words) == 0
    before = _sums(tmp_path / "int4")
    damaged = tmp_path / "int4" / "model-00002-of-000007.safetensors"
    _flip(damaged, 40_000)
    check = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=damaged.parent, capture_output=True, check=False)
    assert check.returncode == 1
    capsys.readouterr()
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert f"{damaged} was damaged and has been written again" in shown
    assert _sums(tmp_path / "int4") == before
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=damaged.parent, check=True)


def _fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_converted_is_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "target")
    words = ["convert", str(source), target, "--to", "int4"]
    assert f"{target} is no folder" in _fails(["convert", target, target, "--to", "int4"], capsys)
    assert "is in bf16 already" in _fails(["convert", str(source), target, "--to", "bf16"], capsys)
    assert "is not empty" in _fails(["convert", str(source), str(source), "--to", "int4"], capsys)

    (source / "SHA256SUMS").unlink()
    file = source / "model-00004-of-000007.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"{file}: truncated or no safetensors file" in _fails(words, capsys)
    file.unlink()
    assert f"{file}: missing, though" in _fails(words, capsys)
    (source / "model.safetensors.index.json").unlink()
    assert "the tensor language_model.model.layers.3." in _fails(words, capsys)
    file.write_bytes(whole)
    save_file({"model.mtp.weight": torch.ones(2)}, source / "extra.safetensors")
    assert "extra.safetensors: model.mtp.weight is no part of this model" in _fails(words, capsys)
    (source / "extra.safetensors").unlink()

    config = json.loads((source / "config.json").read_text())
    for name, value, says in [
        ("n_group", 8, "config.json: text_config.n_group is 8; this model computes only 1"),
        ("n_routed_experts", 4, "do the two belong together?"),
        ("hidden_size", 130, "do the two belong together?"),
    ]:
        changed = config | {"text_config": config["text_config"] | {name: value}}
        changed["vision_config"] = config["vision_config"] | {"text_hidden_size": changed["text_config"]["hidden_size"]}
        (source / "config.json").write_text(json.dumps(changed))
        assert says in _fails(words, capsys)
    (source / "config.json").write_text(json.dumps(config)[:-20])
    assert "config.json: truncated or no JSON" in _fails(words, capsys)
    (source / "config.json").write_text(json.dumps(config))

    for path in source.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert "holds no safetensors files, only model-00001-of-000007.bin, and a pickle" in _fails(words, capsys)


def test_a_target_belongs_to_one_conversion_and_one_process(
    bf16: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "int4"
    convert(bf16, target, "int4")
    sums = read_checksums(source)
    other = source / "model-00001-of-000007.safetensors"
    _flip(other, other.stat().st_size - 10)
    write_checksums(source, sums | {other.name: sha256(other)})
    words = ["convert", str(source), str(target), "--to", "int4"]
    assert "holds the conversion of another checkpoint" in _fails(words, capsys)
    with (target / "conversion.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in _fails(["convert", str(bf16), str(target), "--to", "int4"], capsys)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    broken = _model()
    weights(broken)[EXPERT][5, 5] = float("nan")
    save_release(broken, tmp_path / "bf16", "bf16")
    with pytest.raises(ValueError, match=f"{EXPERT}: weights are not finite"):
        convert(tmp_path / "bf16", tmp_path / "int4", "int4")


def test_files_beside_the_weights_come_along_and_pickles_do_not(source: Path, tmp_path: Path) -> None:
    (source / "SHA256SUMS").unlink()
    (source / "tiktoken.model").write_text("IQ== 0\n")
    (source / "training_args.bin").write_bytes(b"\x80\x04.")
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "c.C"}}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "int4", "int4")
    assert (tmp_path / "int4" / "tiktoken.model").read_text() == "IQ== 0\n"
    assert "tiktoken.model" in read_checksums(tmp_path / "int4")
    assert not (tmp_path / "int4" / "training_args.bin").exists()
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["auto_map"] == {"AutoConfig": "c.C"}


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(bf16: Path, tmp_path: Path) -> None:
    """A file system of 3 MB in a mount namespace of its own, for a conversion of 4 MB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    run = f"{sys.executable} -m baltoro.cli convert {bf16} {mount}/int4 --to int4"
    script = f"""
        mount -t tmpfs -o size=3m none {mount} && echo mounted
        {run}; echo $?
        mount -o remount,size=5m {mount}
        {run}; echo $?
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if "mounted" not in done.stdout:
        pytest.skip("this machine allows no mount namespaces")
    lines = done.stdout.splitlines()
    full = [line for line in lines if line.startswith("baltoro: ")]
    assert len(full) == 1
    assert re.match(r"baltoro: No space left on device: 4,\d{3},\d{3} bytes are needed and ", full[0])
    assert full[0].endswith("; free some space and run the same command again: it resumes")
    assert lines[-1] == "0"


def test_a_failing_write_names_the_file_and_leaves_no_shard(bf16: Path, tmp_path: Path) -> None:
    """The kernel refuses files above 400 kB, as a full quota would."""
    target = tmp_path / "int4"
    done = subprocess.run(
        [sys.executable, "-m", "baltoro.cli", "convert", str(bf16), str(target), "--to", "int4"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )
    assert done.returncode == 2
    shard = target / "model-00001-of-000007.writing"
    assert done.stderr == (f"baltoro: File too large: {shard}; mend this and run the same command again: it resumes\n")
    assert not list(target.glob("*.safetensors"))


def test_the_command_offers_the_formats() -> None:
    assert cli.COMMANDS["convert"].forms == FORMATS
    assert os.environ["OMP_NUM_THREADS"] == "1"
