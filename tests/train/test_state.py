import dataclasses
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baltoro.model.config import NANO, ModelConfig
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25, routers
from baltoro.train.stage import optimizer_for
from baltoro.train.state import Progress, load_state, read_progress, save_state

CONFIG = dataclasses.replace(
    NANO,
    text=dataclasses.replace(NANO.text, vocab_size=32, hidden_size=16, num_layers=2, intermediate_size=16),
    vision=dataclasses.replace(NANO.vision, num_layers=1, hidden_size=16, intermediate_size=16),
)
PROGRESS = Progress("sft", 7, 12.5, 4096)


def _model(seed: int, config: ModelConfig = CONFIG) -> KimiK25:
    model = KimiK25(config, media_pad=31)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def _same(a: KimiK25, b: KimiK25) -> bool:
    wanted = b.state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in a.state_dict().items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "sft.safetensors"
    save_state(path, _model(1), None, PROGRESS)
    return path


def test_weights_optimiser_and_progress_come_back(tmp_path: Path) -> None:
    path = tmp_path / "sft.safetensors"
    model = _model(1)
    optimizer = optimizer_for(model, ("language_model",), 0.1)
    for name, tensor in optimizer.state.items():
        tensor.fill_(len(name))
    optimizer.step_count = 7
    routers(model)[0].e_score_correction_bias[2] = 0.5
    save_state(path, model, optimizer, PROGRESS)
    other = _model(2)
    fresh = optimizer_for(other, ("language_model",), 0.1)
    assert load_state(path, other, fresh) == PROGRESS
    assert read_progress(path) == PROGRESS
    assert _same(other, model)
    assert fresh.step_count == 7
    assert all(bool((tensor == len(name)).all()) for name, tensor in fresh.state.items())
    assert [p.name for p in tmp_path.iterdir()] == ["sft.safetensors"]


@settings(max_examples=15)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_named_and_nothing_is_loaded(saved: Path, part: float) -> None:
    whole = saved.read_bytes()
    cut = saved.with_name("cut.safetensors")
    cut.write_bytes(whole[: int(part * len(whole))])
    model, untouched = _model(2), _model(2)
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated") as caught:
        load_state(cut, model)
    assert "\n" not in str(caught.value)
    assert _same(model, untouched)


def test_other_problems_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such checkpoint"):
        load_state(tmp_path / "nothing.safetensors", _model(1))
    wider = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, hidden_size=32))
    with pytest.raises(ValueError, match=r"sft\.safetensors belongs to another model"):
        load_state(saved, _model(1, wider))
    other = tmp_path / "text.safetensors"
    other.write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.safetensors: truncated or no checkpoint"):
        read_progress(other)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails half way with the system's error."""
    path = tmp_path / "sft.safetensors"
    model = _model(1)
    save_state(path, model, None, PROGRESS)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"sft\.safetensors: could not be written") as caught:
            save_state(path, _model(2), None, dataclasses.replace(PROGRESS, step=8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["sft.safetensors"]
    assert load_state(path, _model(2)) == PROGRESS
