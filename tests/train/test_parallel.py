"""Processes that share a step: together they take the step of one, each holds the same weights, and none outlives the
leader.

Run as a program (`python test_parallel.py FOLDER`), this file trains a stage in two processes, one of which the test
kills.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from baltoro.chat.messages import TokenSequence
from baltoro.data.mixture import Mixture
from baltoro.model.config import NANO
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25
from baltoro.train.machine import prepare_machine
from baltoro.train.parallel import ALONE, Group, leading
from baltoro.train.stage import StageConfig, StepReport, run_stage
from baltoro.train.state import Progress, save_state

STEPS = 14
CONFIG = dataclasses.replace(
    NANO,
    text=dataclasses.replace(NANO.text, vocab_size=64, hidden_size=32, num_layers=2, intermediate_size=32),
    vision=dataclasses.replace(NANO.vision, num_layers=1, hidden_size=32, intermediate_size=32),
)
STAGE = StageConfig(STEPS, 400, 3e-3, {"text": 1.0}, trains=("language_model",), warmup=2, save_every_s=0.0)


@dataclass(frozen=True)
class Part(Mixture):
    """Of every batch, each `size`-th example, from the `rank`-th on."""

    rank: int = 0
    size: int = 1

    def batch(self, step: int) -> list[TokenSequence]:
        return super().batch(step)[self.rank :: self.size]


def _example(rng: random.Random) -> TokenSequence:
    ids = [rng.randrange(63) for _ in range(rng.randint(4, 40))]
    return TokenSequence(ids, [], [rng.randrange(2) for _ in ids])


def train(folder: Path, group: Group = ALONE) -> None:
    """A stage, of which every process leaves its weights, and the first a line for every step."""
    prepare_machine(1, "float32")
    model = KimiK25(CONFIG, 63)
    initialise(model, torch.Generator().manual_seed(group.rank))  # all begin with the first one's

    def report(step: StepReport) -> None:
        with (folder / "losses").open("a") as losses:
            print(step.step, step.loss.hex(), step.tokens, file=losses, flush=True)

    mixture = Part(lambda rng: {"text": _example}, STAGE.shares, STAGE.tokens, 3, group.rank, group.size)
    run_stage("sft", model, STAGE, mixture, folder / "sft.safetensors", report, group)
    save_state(folder / f"weights{group.rank}.safetensors", model, None, Progress("sft", STEPS, 0.0, 0))
    group.add([torch.zeros(1)])  # the leader's end would be the others'


def _losses(folder: Path) -> dict[int, set[str]]:
    out: dict[int, set[str]] = {}
    for line in (folder / "losses").read_text().splitlines():
        step, rest = line.split(maxsplit=1)
        out.setdefault(int(step), set()).add(rest)
    return out


def _start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, __file__, str(folder)], stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    error = process.communicate()[1]
    assert process.returncode == 0, error


def _others(leader: int) -> list[int]:
    """The processes that it started to train with it."""
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(steps: int, folder: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not ((folder / "losses").exists() and len(_losses(folder)) >= steps):
        time.sleep(0.002)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "together"
    _finish(_start(folder))
    return folder


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith("model.")}


@pytest.mark.timeout(300)
def test_two_processes_take_the_steps_of_one(together: Path, tmp_path: Path) -> None:
    """The mean over all targets, not the mean of means; the experts' load and the learning rate of the whole step.
    Sums in another order differ in rounding, which Muon's sign-like steps enlarge."""
    train(tmp_path)
    one, two = _losses(tmp_path), _losses(together)
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    for step in one:
        ((loss, tokens),), ((other, others),) = ([line.split() for line in losses[step]] for losses in (one, two))
        assert tokens == others
        assert float.fromhex(loss) == pytest.approx(float.fromhex(other), rel=2e-5)
    want, got = (_weights(folder / "sft.safetensors") for folder in (tmp_path, together))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_every_process_holds_the_same_weights(together: Path) -> None:
    first, second = (_weights(together / f"weights{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_a_killed_process_ends_the_other_and_the_stage_goes_on_bitwise(
    together: Path, tmp_path: Path, victim: str
) -> None:
    folder = tmp_path / "broken"
    process = _start(folder)
    _until(4, folder, process)
    (other,) = _others(process.pid)
    os.kill(process.pid if victim == "leader" else other, signal.SIGKILL)
    error = process.communicate()[1]
    if victim == "follower":
        assert process.returncode == 1
        assert "a training process was lost" in error
        assert "start again to go on" in error
    deadline = time.monotonic() + 20
    while _running(other) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _running(other)
    _finish(_start(folder))
    assert _losses(folder) == _losses(together)
    want, got = (load_file(folder / "sft.safetensors") for folder in (together, folder))
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


@pytest.mark.timeout(300)
def test_a_leader_killed_before_all_have_met_leaves_nobody_behind(tmp_path: Path) -> None:
    process = _start(tmp_path)
    while not (others := _others(process.pid)):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()  # ends when nobody holds the pipe
    assert not any(map(_running, others))


def _fails(group: Group) -> None:
    raise ZeroDivisionError(f"of process {group.rank}")


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConnectionError, match="a training process was lost"),
        leading(2, tmp_path / "meeting", _fails) as group,
    ):
        group.share([torch.zeros(1)])
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    where = Path(sys.argv[1])
    with leading(2, where / "meeting", partial(train, where)) as both:
        train(where, both)
