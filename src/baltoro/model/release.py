"""Reading a checkpoint folder in any of the layouts, and filling a `KimiK25` from it."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from baltoro.model.kimi import KimiK25
from baltoro.model.layout import Layout, Released, Shape, blocks, shapes, weights
from baltoro.model.release_config import Json, parse
from baltoro.model.shards import ShardReader, Stored
from baltoro.model.transformers_layout import Transformers

INDEX = "model.safetensors.index.json"
PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl"))


class Checkpoint:
    """A folder of safetensors files in any of the layouts, opened and compared with its config.json: every tensor is
    there, none besides, all in shape. Raises ValueError that names what is wrong. Nothing is ever unpickled."""

    def __init__(self, folder: Path, opened: Callable[[Path], None] = lambda path: None):
        """`opened` is called once for each file, before the first tensor is read from it."""
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        try:
            self.release = parse(self.config)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        self._opened = opened
        self._seen: set[Path] = set()
        self._owners: dict[str, ShardReader] = {}
        self.files = _weight_files(folder)
        for path in self.files:
            reader = ShardReader(path)
            self._owners |= dict.fromkeys(reader.tensors, reader)
        self.layout = self._layout()
        self.shapes = shapes(self.release.model)
        self._check()

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Rows of a weight, by its released name."""
        return self.layout.read(name, self.shapes[name], begin, end, self._get)

    def _get(self, stored: str, at: int, shape: Shape) -> Tensor:
        reader = self._owners[stored]
        if reader.path not in self._seen:
            self._seen.add(reader.path)
            self._opened(reader.path)
        return reader.read(stored, at, shape)

    def _layout(self) -> Layout:
        if "lm_head.weight" in self._owners:
            return Transformers(self.release.model)
        return Released(any(name.endswith(".weight_packed") for name in self._owners))

    def _check(self) -> None:
        expected: dict[str, Stored] = {}
        for name, shape in self.shapes.items():
            expected |= self.layout.stored(name, shape)
        for name, stored in expected.items():
            if name not in self._owners:
                raise ValueError(f"{self.folder}: the tensor {name} is missing; fetch the folder again")
            found = self._owners[name].tensors[name]
            if found.shape != stored.shape or found.dtype.is_floating_point != stored.dtype.is_floating_point:
                raise ValueError(
                    f"{self._owners[name].path}: {name} is {found.dtype} {list(found.shape)}, by config.json it is "
                    f"{stored.dtype} {list(stored.shape)}; do the two belong together?"
                )
        for name in self._owners.keys() - expected.keys():
            raise ValueError(f"{self._owners[name].path}: {name} is no part of this model; remove it")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        files = sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
        for path in files:
            if not path.exists():
                raise ValueError(f"{path}: missing, though {INDEX} names it; fetch it again")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        also = f", only {pickles[0]}, and a pickle can run code when it is read" if pickles else ""
        raise ValueError(f"{folder} holds no safetensors files{also}; give a folder with safetensors files")
    return files


def _read_json(path: Path) -> Json:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of a checkpoint")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: truncated or no JSON ({error}); fetch it again") from None


@torch.no_grad()
def load_release(folder: Path, model: KimiK25) -> None:
    """Fill `model` from a checkpoint in any layout, block by block."""
    checkpoint = Checkpoint(folder)
    if checkpoint.release.model != model.config:
        raise ValueError(f"{folder} holds a model of other sizes ({checkpoint.release.model}); choose another folder")
    for name, view in weights(model).items():
        for begin, end in blocks(name, tuple(view.shape)):
            view[begin:end].copy_(checkpoint.read(name, begin, end))
