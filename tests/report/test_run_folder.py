"""The run folder: one writer, whole files at any moment, logs that go on where the checkpoint stands."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baltoro.report.run_folder import RunFolder, read_lines
from baltoro.rollout.record import replacing

Open = Callable[[], RunFolder]
TAKE = """
import sys
from pathlib import Path
from baltoro.report.run_folder import RunFolder
try:
    folder = RunFolder(Path(sys.argv[1]))
except ValueError as error:
    sys.exit(str(error))
print("taken", flush=True)
sys.stdin.read()
"""


def other_process(path: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", TAKE, str(path)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def open_run(path: Path) -> Iterator[Open]:
    """Opens the folder as a new process would: the one before has let go of it."""
    opened: list[RunFolder] = []

    def let_go() -> None:
        for folder in opened:
            folder._lock.close()

    def open_again() -> RunFolder:
        let_go()
        opened.append(RunFolder(path))
        return opened[-1]

    yield open_again
    let_go()


def test_a_second_process_is_kept_out(open_run: Open, path: Path) -> None:
    folder = open_run()
    folder.log("sft", step=1, loss=2.0)
    second = other_process(path)
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (1, "")
    assert str(path) in err
    assert "in use by another run" in err
    folder.log("sft", step=2, loss=1.0)
    assert [record["step"] for record in read_lines(path / "metrics.jsonl")] == [1, 2]


def test_a_killed_process_leaves_the_folder_free(open_run: Open, path: Path) -> None:
    first = other_process(path)
    assert first.stdout
    assert first.stdout.readline() == "taken\n"
    first.kill()
    first.communicate()
    assert open_run().results == {"stages": {}}


def test_begin_stage_forgets_what_is_behind_the_checkpoint(open_run: Open, path: Path) -> None:
    folder = open_run()
    for stage in ("pretrain", "sft"):
        for step in range(1, 6):
            folder.log(stage, step=step, loss=float(step))
            folder.log_live(stage, step, f"{stage} {step}")
    folder = open_run()
    folder.begin_stage("sft", 3)
    assert [record["step"] for record in folder.metrics("sft")] == [1, 2, 3]
    assert [record["step"] for record in folder.metrics("pretrain")] == [1, 2, 3, 4, 5]
    folder.log("sft", step=4, loss=0.5)
    folder.log_live("sft", 4, "again")
    for name in ("metrics.jsonl", "live.jsonl"):
        kept = [(record["stage"], record["step"]) for record in read_lines(path / name)]
        assert kept == [*(("pretrain", step) for step in range(1, 6)), *(("sft", step) for step in (1, 2, 3, 4))]
    assert read_lines(path / "live.jsonl")[-1]["text"] == "again"
    folder.begin_stage("sft", 0)
    assert folder.metrics("sft") == []
    assert len(folder.metrics("pretrain")) == 5


def test_a_half_written_last_line_is_dropped(open_run: Open, path: Path) -> None:
    folder = open_run()
    for step in (1, 2, 3):
        folder.log("sft", step=step, loss=0.25)
    whole = (path / "metrics.jsonl").read_bytes()
    last = len(whole.splitlines()[-1]) + 1
    for cut in range(1, last):
        (path / "metrics.jsonl").write_bytes(whole[:-cut])
        kept = [record["step"] for record in read_lines(path / "metrics.jsonl")]
        assert kept == ([1, 2, 3] if cut == 1 else [1, 2])  # without its line end alone it is whole
    folder = open_run()
    folder.begin_stage("sft", 2)
    folder.log("sft", step=3, loss=0.5)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "sft", "step": 1, "loss": 0.25},
        {"stage": "sft", "step": 2, "loss": 0.25},
        {"stage": "sft", "step": 3, "loss": 0.5},
    ]


def test_live_text_may_be_anything(open_run: Open, path: Path) -> None:
    text = 'line\nbreak \u2028 \x85 "quote" 汉 \x00'
    folder = open_run()
    folder.log_live("sft", 1, text)
    folder.begin_stage("rl", 0)
    assert [record["text"] for record in read_lines(path / "live.jsonl")] == [text]


def test_replacing_leaves_the_old_file_when_writing_fails(open_run: Open, path: Path) -> None:
    folder = open_run()
    folder.write_json("results.json", {"a": 1})

    def fails_midway() -> None:
        with replacing(path / "results.json") as scratch:
            scratch.write_text('{"a": ')
            assert json.loads((path / "results.json").read_text()) == {"a": 1}  # untouched while it is written
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails_midway()
    assert json.loads((path / "results.json").read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        folder.write_json("results.json", {"a": object()})
    assert json.loads((path / "results.json").read_text()) == {"a": 1}
    folder.write_json("results.json", {"a": 2})
    assert json.loads((path / "results.json").read_text()) == {"a": 2}
    assert not list(path.glob("*.writing"))


def test_results_are_there_again(open_run: Open) -> None:
    folder = open_run()
    for step, loss in enumerate((9.0, 4.0, 5.0), start=1):
        folder.log("sft", step=step, loss=loss)
        folder.log("rl", step=step, reward=0.1 * step)
    folder.end_stage("sft", "learns", 12.5, 1000, "loss")
    folder.end_stage("rl", "acts", 2.5, 10, "reward")
    folder.update(seed=3)
    assert open_run().results == {
        "stages": {
            "sft": {"what": "learns", "wall_s": 12.5, "tokens": 1000, "loss_first": 9.0, "loss_last": 5.0},
            "rl": {"what": "acts", "wall_s": 2.5, "tokens": 10, "loss_first": 0.1, "loss_last": pytest.approx(0.3)},
        },
        "seed": 3,
    }


def test_check_config_names_the_changed_key(open_run: Open, path: Path) -> None:
    config = {"seed": 1, "vit": {"steps": 3, "lr": 0.1}, "dtype": "auto"}
    open_run().check_config(config)
    open_run().check_config(dict(reversed(config.items())))  # the order says nothing
    for changed, key in (
        ({**config, "seed": 2}, "seed"),
        ({**config, "vit": {"steps": 4, "lr": 0.1}}, "vit"),
        ({**config, "corpus": "books"}, "corpus"),
        ({"seed": 1, "vit": {"steps": 3, "lr": 0.1}}, "dtype"),
    ):
        with pytest.raises(ValueError, match=rf"another {key};") as error:
            open_run().check_config(changed)
        assert str(path) in str(error.value)
    assert json.loads((path / "config.json").read_text()) == config
