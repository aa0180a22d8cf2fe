"""Writing a checkpoint folder: from a model, or from a checkpoint in another layout.

Weights stream through in blocks, so memory is bounded whatever the size of the model. A shard is written beside its
place, read back for its checksum, and renamed; `SHA256SUMS` grows by it. So whatever interrupts, each shard that is
listed there is whole, and the next run keeps it if its checksum still holds. config.json and the index come last.
"""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from baltoro.model.kimi import KimiK25
from baltoro.model.layout import Layout, Released, blocks, shards, weights
from baltoro.model.release import INDEX, PICKLES, Checkpoint
from baltoro.model.release_config import Json, Release
from baltoro.model.shards import (
    CHECKSUMS,
    ShardWriter,
    Stored,
    header,
    read_checksums,
    sha256,
    write_checksums,
    write_whole,
)
from baltoro.model.transformers_layout import Transformers

FORMATS = ("bf16", "int4", "hf")
_RECORD = "conversion.json"
# A model without YaRN was trained on one context length, which its config does not hold; Moonlight's is 8192.
_UNSTRETCHED = 8192

Read = Callable[[str, int, int], Tensor]
# Bytes done, bytes in all.
Report = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


@torch.no_grad()
def save_release(model: KimiK25, folder: Path, form: str) -> None:
    """Writes `model` in one of FORMATS to an empty or new folder."""
    _require_empty(folder)
    yarn = model.config.text.yarn
    context = int(yarn.factor * yarn.original_max_position) if yarn else _UNSTRETCHED
    release = Release(model.config, model.media_pad, context)
    layout, views = _layout(form, release), weights(model)
    _write(folder, release, layout, {}, lambda name, begin, end: views[name][begin:end], set(), _silent)


def convert(source: Path, target: Path, form: str, report: Report = _silent) -> list[str]:
    """Writes the checkpoint `source` in one of FORMATS to `target`, and goes on where an earlier run was interrupted.

    Run again after its end, it verifies `target` and writes damaged shards anew; their names are returned. A source
    with `SHA256SUMS` is verified, each file before it is first read. Raises ValueError, or OSError on a full disk.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give the folder of a checkpoint")
    sums = read_checksums(source)

    def verify(path: Path) -> None:
        if path.name in sums and sha256(path) != sums[path.name]:
            raise ValueError(f"{path}: damaged, its checksum is not the one in {CHECKSUMS}; fetch it again")

    others = [path for path in sorted(source.iterdir()) if path.is_file() and path.suffix not in _NOT_COPIED]
    for path in others:
        verify(path)
    checkpoint = Checkpoint(source, opened=verify)
    layout = _layout(form, checkpoint.release)
    if layout.name == checkpoint.layout.name:
        raise ValueError(f"{source} is in {form} already; there is nothing to convert")
    # What the source is: its checksums, so that a damaged file may be fetched anew, or else what tells a changed file.
    record = {
        "to": form,
        "files": {
            path.name: sums.get(path.name) or [path.stat().st_size, path.stat().st_mtime_ns]
            for path in checkpoint.files
        },
    }
    if not (target / _RECORD).exists():
        _require_empty(target)
        write_whole(target / _RECORD, json.dumps(record))
    with (target / _RECORD).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, error.strerror, str(target)) from None
        if json.load(file) != record:
            raise ValueError(f"{target} holds the conversion of another checkpoint; choose another folder")
        copies = [path for path in others if path.name not in ("config.json", INDEX, CHECKSUMS, _RECORD)]
        for path in copies:
            shutil.copyfile(path, target / path.name)
        # The release's own code, for who loads with trust_remote_code; transformers' own classes need none.
        code = {"auto_map": checkpoint.config["auto_map"]} if form != "hf" and "auto_map" in checkpoint.config else {}
        names = {path.name for path in copies}
        return _write(target, checkpoint.release, layout, code, checkpoint.read, names, report)


_NOT_COPIED = PICKLES | {".safetensors", ".writing"}


def _require_empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder")


def _layout(form: str, release: Release) -> Layout:
    if form not in FORMATS:
        raise ValueError(f"{form!r} is no format; choose one of {', '.join(FORMATS)}")
    return Transformers(release.model) if form == "hf" else Released(form == "int4")


def _write(
    folder: Path, release: Release, layout: Layout, code: Json, read: Read, copied: set[str], report: Report
) -> list[str]:
    """Writes shards that `SHA256SUMS` in `folder` does not list, then the files beside them. Returns the names of
    those that were listed and damaged."""
    plan: dict[str, dict[str, Stored]] = {}
    contents = shards(release.model)
    for file, names in contents.items():
        plan[file] = {}
        for name, shape in names.items():
            plan[file] |= layout.stored(name, shape)
    sizes = {file: len(header(stored)[0]) + _bytes(stored) for file, stored in plan.items()}
    total, done = sum(sizes.values()), 0
    needed = sum(size for file, size in sizes.items() if not (folder / file).exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        short = f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed and {free:,} free"
        raise OSError(errno.ENOSPC, short, str(folder))
    sums, damaged = read_checksums(folder), []
    for file, names in contents.items():
        report(done, total)
        path = folder / file
        if file not in sums or not path.exists() or sha256(path) != sums[file]:
            if file in sums:
                damaged.append(file)
            scratch = path.with_suffix(".writing")
            with ShardWriter(scratch, plan[file]) as writer:
                elements, passed = sum(math.prod(shape) for shape in names.values()), 0
                for name, shape in names.items():
                    for begin, end in blocks(name, shape):
                        layout.write(name, shape, begin, read(name, begin, end), writer.put)
                    passed += math.prod(shape)
                    report(done + sizes[file] * passed // elements, total)
            digest = sha256(scratch)
            scratch.rename(path)
            sums[file] = digest
            write_checksums(folder, sums)
        done += sizes[file]
    index = {
        "metadata": {"total_size": sum(_bytes(stored) for stored in plan.values())},
        "weight_map": {name: file for file, stored in plan.items() for name in sorted(stored)},
    }
    beside: dict[str, Json] = {"config.json": layout.config(release) | code, INDEX: index}
    if "generation_config.json" not in copied:
        beside["generation_config.json"] = {"max_length": release.max_position, "eos_token_id": release.stop}
    for name, content in beside.items():
        write_whole(folder / name, json.dumps(content, indent=2) + "\n")
    write_checksums(folder, sums | {name: sha256(folder / name) for name in {*beside, *copied}})
    report(total, total)
    return damaged


def _bytes(stored: Mapping[str, Stored]) -> int:
    return sum(tensor.size for tensor in stored.values())
