"""transformers' `kimi_k25` as the other side: it reads what we write, we read what it writes, both compute alike."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Kimi_K25ForConditionalGeneration
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config

from baltoro.model.attention import Segments
from baltoro.model.config import NANO, Yarn
from baltoro.model.convert import convert, save_release
from baltoro.model.init import initialise
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.release import load_release
from baltoro.model.release_config import Release, transformers_json
from baltoro.model.shards import read_checksums

PAD = 200
GRIDS = [(1, 4, 6), (1, 2, 2)]
CONFIG = dataclasses.replace(
    NANO,
    text=dataclasses.replace(
        NANO.text, vocab_size=256, num_layers=3, q_lora_rank=48, yarn=Yarn(factor=4.0, original_max_position=64)
    ),
)


@pytest.fixture(scope="module")
def model() -> KimiK25:
    """Random in every part, in numbers that bfloat16 holds."""
    module = KimiK25(CONFIG, media_pad=PAD)
    generator = torch.Generator().manual_seed(0)
    initialise(module, generator)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.dim() == 1:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor.bfloat16())
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def released(model: KimiK25, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "bf16"
    save_release(model, folder, "bf16")
    return folder


def _load(folder: Path, **settings: Any) -> Kimi_K25ForConditionalGeneration:
    """Every tensor in the folder has its place, and every place a tensor."""
    load: Any = Kimi_K25ForConditionalGeneration.from_pretrained
    theirs, loading = load(folder, dtype=torch.float32, output_loading_info=True, **settings)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return theirs.eval()


def _prompt() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([1, 2, *[PAD] * 6, 3, 4, 5, PAD, *range(6, 40)])
    return ids, torch.randn(28, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _our_logits(model: KimiK25) -> torch.Tensor:
    ids, patches = _prompt()
    return model.logits(model(Batch(ids, Segments([len(ids)]), patches, GRIDS)))


def _their_logits(model: Kimi_K25ForConditionalGeneration) -> torch.Tensor:
    ids, patches = _prompt()
    grids = torch.tensor(GRIDS)
    with torch.no_grad():
        return model(input_ids=ids[None], pixel_values=patches, image_grid_thw=grids, use_cache=False).logits[0]


def test_the_released_layout_gives_the_same_logits_in_transformers(model: KimiK25, released: Path) -> None:
    """transformers reads the release's tensor names, but of its vision_config only the sizes of K2.5."""
    config = Kimi_K25Config(**transformers_json(Release(CONFIG, PAD, 256)))
    torch.testing.assert_close(_their_logits(_load(released, config=config)), _our_logits(model), atol=1e-4, rtol=1e-4)


def test_hf_loads_in_transformers_and_comes_back(model: KimiK25, released: Path, tmp_path: Path) -> None:
    convert(released, tmp_path / "hf", "hf")
    theirs = _load(tmp_path / "hf")
    torch.testing.assert_close(_their_logits(theirs), _our_logits(model), atol=1e-4, rtol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    back = KimiK25(CONFIG, media_pad=PAD)
    load_release(tmp_path / "theirs", back)
    for (name, ours), again in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(ours, again), name
    convert(tmp_path / "theirs", tmp_path / "bf16", "bf16")
    # Every byte of the release is there again, config.json included; only what transformers itself adds is not.
    sums, again = read_checksums(released), read_checksums(tmp_path / "bf16")
    assert {name: again[name] for name in sums if name != "generation_config.json"} == {
        name: digest for name, digest in sums.items() if name != "generation_config.json"
    }
