"""The released checkpoint layout: names, shapes, dtypes and shards.

`weights` are what every layout stores, by the release's names and in its orientation (routed experts one by one,
[out, in]). A `Layout` says under which names and in which form they lie in files: `Released` in bfloat16 or with INT4
routed experts, `transformers_layout.Transformers` as that library names and stacks them.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from baltoro.model.config import ModelConfig
from baltoro.model.int4 import GROUP, dequantise, pack, quantise, unpack
from baltoro.model.kimi import KimiK25
from baltoro.model.moe import Experts
from baltoro.model.release_config import Json, Release, released_json
from baltoro.model.shards import Stored

# Weights pass through memory in blocks of rows of about so many elements. 4 MB of float32 and what quantisation makes
# of them stay in the processor's cache: over twice as fast as whole matrices of 15 million.
_BLOCK = 1 << 20

Shape = tuple[int, ...]
# Elements of a stored tensor: get(name, at, shape) and put(name, values, at), from element `at` on.
Get = Callable[[str, int, Shape], Tensor]
Put = Callable[[str, Tensor, int], None]


def weights(model: KimiK25) -> dict[str, Tensor]:
    """Released name -> writable view of the model's own parameter or buffer."""
    found = model.state_dict()
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            for projection, stack in module.named_parameters():
                del found[f"{prefix}.{projection}"]
                for i, matrix in enumerate(stack.detach()):
                    found[f"{prefix}.{i}.{projection}.weight"] = matrix.T
    return found


def shapes(config: ModelConfig) -> dict[str, Shape]:
    """Released name -> shape, without allocating a weight."""
    with torch.device("meta"):
        model = KimiK25(config, media_pad=0)
    return {name: tuple(view.shape) for name, view in weights(model).items()}


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16


def shards(config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """File -> the weights in it with their shapes: a file per layer, then one for embeddings, head and norm, one for
    the projector, one for the vision tower. 64 files for K2.5."""
    layers = config.text.num_layers
    files = [f"model-{i + 1:05d}-of-{layers + 3:06d}.safetensors" for i in range(layers + 3)]
    found: dict[str, dict[str, Shape]] = {file: {} for file in files}
    for name, shape in shapes(config).items():
        layer = re.match(r"language_model\.model\.layers\.(\d+)\.", name)
        part = ("language_model", "mm_projector", "vision_tower").index(name.partition(".")[0])
        found[files[int(layer[1]) if layer else layers + part]][name] = shape
    return found


def blocks(name: str, shape: Shape) -> Iterator[tuple[int, int]]:
    """Row ranges that together are a weight. A fused wqkv stays whole: transformers permutes its rows."""
    rows = shape[0] if ".wqkv." in name else max(1, _BLOCK * shape[0] // math.prod(shape))
    for begin in range(0, shape[0], rows):
        yield begin, min(begin + rows, shape[0])


class Layout(Protocol):
    name: str

    def config(self, release: Release) -> Json: ...

    def stored(self, name: str, shape: Shape) -> dict[str, Stored]:
        """The stored tensors in which a weight lies; one may hold several weights."""
        ...

    def read(self, name: str, shape: Shape, begin: int, end: int, get: Get) -> Tensor:
        """Rows begin..end of a weight of `shape`."""
        ...

    def write(self, name: str, shape: Shape, begin: int, rows: Tensor, put: Put) -> None:
        """Rows from `begin` on of a weight of `shape`."""
        ...


class Released:
    """The hub's layout; INT4 is how K2.5 was released, bfloat16 what one trains and converts."""

    def __init__(self, quantised: bool):
        self.quantised = quantised
        self.name = "int4" if quantised else "bf16"

    def config(self, release: Release) -> Json:
        return released_json(release, self.quantised)

    def stored(self, name: str, shape: Shape) -> dict[str, Stored]:
        if not self._packs(name):
            return {name: Stored(dtype_of(name), shape)}
        rows, columns = shape
        if columns % GROUP:
            raise ValueError(f"{name} has {columns} inputs; INT4 needs a multiple of {GROUP}")
        return {
            f"{name}_packed": Stored(torch.int32, (rows, columns // 8)),
            f"{name}_scale": Stored(torch.bfloat16, (rows, columns // GROUP)),
            f"{name}_shape": Stored(torch.int32, (2,)),
        }

    def read(self, name: str, shape: Shape, begin: int, end: int, get: Get) -> Tensor:
        if not self._packs(name):
            return get(name, begin * math.prod(shape[1:]), (end - begin, *shape[1:]))
        words, groups = shape[1] // 8, shape[1] // GROUP
        steps = unpack(get(f"{name}_packed", begin * words, (end - begin, words)))
        return dequantise(steps, get(f"{name}_scale", begin * groups, (end - begin, groups)))

    def write(self, name: str, shape: Shape, begin: int, rows: Tensor, put: Put) -> None:
        if not self._packs(name):
            put(name, rows, begin * math.prod(shape[1:]))
            return
        try:
            steps, scale = quantise(rows)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; it cannot be written as INT4") from None
        put(f"{name}_packed", pack(steps), begin * shape[1] // 8)
        put(f"{name}_scale", scale, begin * shape[1] // GROUP)
        if begin == 0:
            put(f"{name}_shape", torch.tensor(shape), 0)

    def _packs(self, name: str) -> bool:
        return self.quantised and ".mlp.experts." in name
