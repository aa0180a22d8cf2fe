"""The whole recipe at the size of a test: it ends, it resumes exactly after kill -9, it refuses what it cannot do."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from baltoro.chat.tokenizer import Tokenizer
from baltoro.config import load
from baltoro.recipe.run import Run
from baltoro.recipe.settings import RecipeConfig
from baltoro.report.progress import Progress as Display
from baltoro.report.run_folder import RunFolder
from baltoro.rollout.record import read_episodes
from baltoro.rollout.verify import verify

RUN_FILE = Path(__file__).parents[2] / "configs" / "nano.toml"
TINY = [
    "threads=2",
    "dtype=float32",
    "vit.steps=3",
    "vit.tokens=512",
    "projector.steps=1",
    "projector.tokens=256",
    "pretrain.steps=4",
    "pretrain.tokens=512",
    "longctx.stage.steps=2",
    "longctx.stage.tokens=512",
    "longctx.stage.recompute=true",
    "sft.steps=3",
    "sft.tokens=512",
    "rl.iterations=2",
    "rl.tasks=2",
    "rl.rollouts=2",
    "parl.rl.iterations=2",
    "parl.rl.tasks=1",
    "parl.rl.rollouts=2",
    "agents.rules.max_turn_tokens=32",
    "agents.slots=16",
    "evaluation.vision_n=2",
    "evaluation.code_n=2",
    "evaluation.wide_n=1",
    "evaluation.curve_n=1",
    "evaluation.budgets=[4, 6]",
    "evaluation.packages_per_task=30",
]
# What depends on the clock or the machine, not on the computation.
MEASURED = {"wall_s", "evaluation_s", "peak_rss_mb", "seconds", "name", "command", "commit"}


def start(folder: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "baltoro.cli", "recipe", str(RUN_FILE), f"folder={folder}", *TINY, *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def computed(value: object) -> object:
    if isinstance(value, dict):
        return {key: computed(item) for key, item in value.items() if key not in MEASURED}
    if isinstance(value, list):
        return [computed(item) for item in value]
    return value


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    process = start(folder)
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    assert "report:" in out
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_in_the_type_it_began_with(tmp_path: Path, uninterrupted: Path, dtype: torch.dtype) -> None:
    """Whichever is faster now."""
    (tmp_path / "results.json").write_text(json.dumps({"stages": {}, "dtype": str(dtype).removeprefix("torch.")}))
    config = load(RUN_FILE, [f"folder={tmp_path}"], RecipeConfig)
    tokenizer = Tokenizer.load(uninterrupted / "tokenizer.tiktoken")
    folder = RunFolder(tmp_path)
    run = Run(config, folder, Display({}), tokenizer)
    folder._lock.close()
    assert run.model.dtype == dtype


def test_results_and_report_are_written(uninterrupted: Path) -> None:
    results = json.loads((uninterrupted / "results.json").read_text())
    assert set(results["stages"]) == {"vit", "projector", "pretrain", "longctx", "sft", "rl", "parl"}
    for mode in ("single", "swarm"):
        assert 0 <= results["wide_search"][mode]["item_f1"] <= 1
        assert results["wide_search"][mode]["critical_steps"] <= results["wide_search"]["budget"]
    assert results["real_documents"]["packages"] >= 30
    page = (uninterrupted / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(("stage", "episodes"), [("rl", 4), ("parl", 2)])
def test_the_last_episodes_of_a_stage_are_kept_and_sound(uninterrupted: Path, stage: str, episodes: int) -> None:
    recording = read_episodes(uninterrupted / "episodes" / f"{stage}.jsonl")
    assert len(recording.records) == episodes
    assert [str(finding) for finding in verify(recording)] == []
    assert all(record.advantage is not None for record in recording.records)


@pytest.mark.timeout(300)
def test_killed_runs_end_with_the_same_numbers(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    rng = random.Random(0)
    kills = 0
    while True:
        process = start(folder, "sft.save_every_s=0", "pretrain.save_every_s=0")
        try:
            # Importing takes some seconds, so kills fall into every stage as the run moves on.
            _, err = process.communicate(timeout=rng.uniform(5, 12) if kills < 4 else 200)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        else:
            break
    assert process.returncode == 0, err
    assert kills
    whole, resumed = (json.loads((f / "results.json").read_text()) for f in (uninterrupted, folder))
    assert computed(resumed) == computed(whole)
    losses = [(f / "metrics.jsonl").read_text().splitlines() for f in (uninterrupted, folder)]
    assert [computed(json.loads(line)) for line in losses[1]] == [computed(json.loads(line)) for line in losses[0]]


def refused(folder: Path, *extra: str) -> str:
    process = start(folder, *extra)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    return err


def test_unknown_key(tmp_path: Path) -> None:
    assert "vit.step" in refused(tmp_path / "run", "vit.step=3")


def test_other_configuration_in_the_same_folder(uninterrupted: Path) -> None:
    before = (uninterrupted / "results.json").read_bytes()
    assert "seed" in refused(uninterrupted, "seed=5")
    assert (uninterrupted / "results.json").read_bytes() == before


def test_truncated_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = uninterrupted / "checkpoints" / "pretrain.safetensors"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    try:
        assert "pretrain.safetensors" in refused(uninterrupted)
    finally:
        checkpoint.write_bytes(whole)


def test_second_run_in_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start(folder)
    try:
        while not (folder / "config.json").exists():
            assert first.poll() is None
            time.sleep(0.05)
        assert "in use" in refused(folder)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_missing_corpus_folder(tmp_path: Path) -> None:
    assert "corpus" in refused(tmp_path / "run", f"corpus={tmp_path / 'nowhere'}")


def test_full_disk_destroys_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "baltoro.cli", "recipe", str(RUN_FILE), f"folder={folder}", *TINY]
    command = f"ulimit -f 2000; exec {shlex.join(words)}"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    assert "vit.safetensors" in process.stderr
    assert not list(folder.glob("checkpoints/*.safetensors"))
