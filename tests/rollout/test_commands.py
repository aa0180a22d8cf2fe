"""The commands as a person runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def baltoro(folder: Path, *words: str, typed: str = "") -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "baltoro.cli", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, input=typed, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


def test_a_new_environment_conforms_and_can_be_played(tmp_path: Path) -> None:
    assert baltoro(tmp_path, "env", "new", "guess")[0] == 0
    text = (tmp_path / "guess.py").read_text()
    assert len(text.splitlines()) < 50
    assert baltoro(tmp_path, "env", "new", "guess.py") == (2, "baltoro: guess.py exists; choose another name\n")
    status, out = baltoro(tmp_path, "env", "check", "guess.py")
    assert (status, out.splitlines()[-1]) == (0, "guess 1: conforms to version 1 of the interface")
    typed = "".join(f"guess number={n}\n" for n in (10, 99)) + "answer 50\n"
    status, out = baltoro(tmp_path, "env", "play", "guess.py", "seed=0", typed=typed)  # the secret is 50
    assert status == 0
    for line in ("too low", "too high", "found: 1", "guesses: 2", "reward: 1"):
        assert line in out
    (tmp_path / "guess.py").write_text(text.replace('version="1"', 'version=""'))
    status, out = baltoro(tmp_path, "env", "check", "guess.py")
    assert (status, out.splitlines()[-1]) == (1, "guess : 1 faults")


def test_an_environment_that_blocks_for_good_is_ended_and_shown(tmp_path: Path) -> None:
    assert baltoro(tmp_path, "env", "new", "hangs")[0] == 0
    file = tmp_path / "hangs.py"
    before, after = file.read_text().split("        if number ==")
    file.write_text(f"{before}        __import__('time').sleep(1e9)\n        if number =={after}")
    status, out = baltoro(tmp_path, "env", "check", "hangs.py", "check_s=3")
    assert status == 1
    assert "Timeout (0:00:03)!" in out
    assert f'hangs.py", line {before.count(chr(10)) + 1} in guess' in out


@pytest.mark.parametrize("words", [["env", "check", "absent.py"], ["trace", "verify", "absent.jsonl"]])
def test_a_missing_file_is_one_line(tmp_path: Path, words: list[str]) -> None:
    status, out = baltoro(tmp_path, *words)
    assert (status, out.count("\n")) == (2, 1)
    assert f"No such file or directory: {words[-1]}" in out
