"""What a stage needs to go on exactly where it stopped: weights, optimiser state and a step number, in one file."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from baltoro.model.kimi import KimiK25
from baltoro.optim.muon import MuonAdamW


@dataclass(frozen=True)
class Progress:
    """stage: its name; step: finished steps of it; seconds, tokens: spent in it so far, over all sittings."""

    stage: str
    step: int
    seconds: float
    tokens: int


def save_state(path: Path, model: KimiK25, optimizer: MuonAdamW | None, progress: Progress) -> None:
    """Written beside its place, synced, then renamed: at any moment `path` is whole, old or new. OSError on a full
    disk leaves the old one."""
    tensors = {f"model.{name}": t.contiguous() for name, t in model.state_dict().items()}
    meta = asdict(progress)
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.state.items()}
        meta["optimizer_steps"] = optimizer.step_count
    scratch = path.with_suffix(".writing")
    try:
        save_file(tensors, scratch, metadata={"progress": json.dumps(meta)})
    except SafetensorError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error}); free some disk space and start again") from None
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
    scratch.rename(path)


def read_progress(path: Path) -> Progress:
    return _read_meta(path)[0]


def load_state(path: Path, model: KimiK25, optimizer: MuonAdamW | None = None) -> Progress:
    """Fill `model` and `optimizer` in place. Raises ValueError for a damaged file or one of another model."""
    progress, steps = _read_meta(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, torch.Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, error) from None
    try:
        model.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} belongs to another model ({reason}); choose another run folder") from None
    if optimizer is not None:
        for name, tensor in optimizer.state.items():
            tensor.copy_(tensors[f"optimizer.{name}"])
        optimizer.step_count = steps
    return progress


def _read_meta(path: Path) -> tuple[Progress, int]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; delete the run folder to start afresh")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["progress"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None
    steps = meta.pop("optimizer_steps", 0)
    return Progress(**meta), steps


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: truncated or no checkpoint ({error}); delete this file to repeat its stage")
