"""A stage that is killed goes on as if nothing had happened; frozen parts stay; attention logits stay bounded.

Run as a program (`python test_stage.py FOLDER`), this file trains the stage that the test kills.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.data.mixture import Mixture
from baltoro.model.attention import MLA
from baltoro.model.config import NANO
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25, routers
from baltoro.train.machine import prepare_machine
from baltoro.train.packing import pack
from baltoro.train.stage import StageConfig, StepReport, after_step, run_stage

PAD = 63
STEPS = 14
SOURCES = {"text": lambda rng: _example(rng, False), "picture": lambda rng: _example(rng, True)}
MIXTURE = Mixture(lambda rng: SOURCES, {"text": 0.5, "picture": 0.5}, 200, seed=3)
CONFIG = dataclasses.replace(
    NANO,
    text=dataclasses.replace(NANO.text, vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=32),
    vision=dataclasses.replace(NANO.vision, num_layers=1, hidden_size=32, intermediate_size=32),
)


def _example(rng: random.Random, picture: bool) -> TokenSequence:
    ids = [rng.randrange(PAD) for _ in range(rng.randint(4, 40))]
    if not picture:
        return TokenSequence(ids, [], [1] * len(ids))
    pixels = np.random.default_rng(rng.randrange(2**32)).standard_normal((8, 3, 8, 8), dtype=np.float32)
    return TokenSequence([1, PAD, PAD, *ids], [MediaItem(pixels, (1, 2, 4))], [0, 0, 0, *[1] * len(ids)])


def _model() -> KimiK25:
    model = KimiK25(CONFIG, PAD)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def _stage(folder: Path, config: StageConfig) -> None:
    with (folder / "losses").open("a") as losses:

        def report(step: StepReport) -> None:
            print(step.step, step.loss.hex(), step.tokens, file=losses, flush=True)

        run_stage("sft", _model(), config, MIXTURE, folder / "sft.safetensors", report)


def _start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"})


def _losses(folder: Path) -> dict[int, set[str]]:
    out: dict[int, set[str]] = {}
    if (folder / "losses").exists():
        for line in (folder / "losses").read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                step, rest = line.split(maxsplit=1)
                out.setdefault(int(step), set()).add(rest)
    return out


@pytest.mark.timeout(600)  # three processes that import torch, on a machine that may be busy
def test_a_killed_stage_goes_on_bitwise(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    assert _start(straight).wait() == 0
    rng = random.Random()
    process = _start(broken)
    kill_after = rng.randint(1, STEPS - 4)
    while len(_losses(broken)) < kill_after and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # Another process runs to the end, from whatever the killed one left.
    assert _start(broken).wait() == 0
    # A step that was repeated because its checkpoint was not yet written had the same loss the second time.
    assert _losses(broken) == _losses(straight)
    assert sorted(_losses(straight)) == list(range(1, STEPS + 1))
    want, got = (load_file(folder / "sft.safetensors") for folder in (straight, broken))
    assert want.keys() == got.keys()
    assert any(name.startswith("optimizer.") for name in want)
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_frozen_parts_stay_bitwise(tmp_path: Path) -> None:
    model, before = _model(), _model().state_dict()
    config = StageConfig(3, 200, 1e-2, {"text": 0.5, "picture": 0.5}, trains=("mm_projector",), warmup=1)
    run_stage("projector", model, config, MIXTURE, tmp_path / "projector.safetensors", lambda step: None)
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"mm_projector"}


def test_router_bias_follows_the_load(tmp_path: Path) -> None:
    model = _model()
    config = StageConfig(1, 200, 0.0, {"text": 0.5, "picture": 0.5}, warmup=1, balance_rate=0.25)
    model.train()
    model(pack(MIXTURE.batch(0), 8).batch)
    (gate,) = routers(model)
    sign = (gate.load.mean() - gate.load).sign()
    gate.load.zero_()
    run_stage("sft", model, config, MIXTURE, tmp_path / "sft.safetensors", lambda step: None)
    torch.testing.assert_close(gate.e_score_correction_bias, 0.25 * (sign - sign.mean()))
    assert bool(sign.any())


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_after_a_step_no_logit_exceeds_the_threshold(q_lora_rank: int | None) -> None:
    model = KimiK25(dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, q_lora_rank=q_lora_rank)), PAD)
    initialise(model, torch.Generator().manual_seed(0))
    attention = [m for m in model.modules() if isinstance(m, MLA)]
    batch = pack(MIXTURE.batch(0), 8).batch
    with torch.no_grad():
        q = attention[0].q_proj if q_lora_rank is None else attention[0].q_b_proj
        q.weight.view(4, -1)[:2] *= 400.0
        model.train()
        model(batch)
        first = attention[0].max_logits.clone()
        assert (first > 100).tolist() == [True, True, False, False]
        assert after_step(model, 0.0) == 2
        model(batch)
    # Only the first layer's inputs are the same as before, so only there the bound is exact.
    assert bool((attention[0].max_logits <= 100 * (1 + 1e-4)).all())
    torch.testing.assert_close(attention[0].max_logits[:2], torch.full((2,), 100.0), rtol=1e-4, atol=0)
    assert torch.equal(attention[0].max_logits[2:], first[2:])


if __name__ == "__main__":
    prepare_machine(1, "float32")
    shares = {"text": 0.5, "picture": 0.5}
    _stage(Path(sys.argv[1]), StageConfig(STEPS, 200, 3e-3, shares, warmup=2, save_every_s=0.0))


def test_recomputed_layers_train_bitwise_alike(tmp_path: Path) -> None:
    """Losses and weights are those of the stored activations; a step keeps much less for its backward pass."""
    losses: dict[bool, list[float]] = {}
    weights: dict[bool, dict[str, torch.Tensor]] = {}
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        model = _model()
        config = StageConfig(6, 400, 1e-2, {"text": 0.5, "picture": 0.5}, warmup=1, recompute=recompute)
        seen: list[float] = []
        kept[recompute] = 0

        def keep(x: torch.Tensor, recompute: bool = recompute) -> torch.Tensor:
            kept[recompute] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run_stage(
                "x",
                model,
                config,
                MIXTURE,
                tmp_path / f"{recompute}.safetensors",
                lambda step, seen=seen: seen.append(step.loss),
            )
        losses[recompute], weights[recompute] = seen, model.state_dict()
    assert losses[True] == losses[False]
    assert [name for name, x in weights[False].items() if not torch.equal(x, weights[True][name])] == []
    assert kept[True] < 0.6 * kept[False]
