import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from baltoro import cli, config


@dataclass(frozen=True)
class Run:
    seed: int


def command(run: Callable[[Path, object], object]) -> cli.Command:
    def discard(file: Path, overrides: object) -> None:
        run(file, overrides)

    return cli.Command("does something", "", "", discard)


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `baltoro recipe` with the given body in the recipe's place; returns the exit status and all of stderr."""
    monkeypatch.delenv("BALTORO_DEBUG", raising=False)

    def run(body: Callable[[Path, object], object], *words: str) -> tuple[int, str]:
        monkeypatch.setitem(cli.COMMANDS, "recipe", command(body))
        status = cli.main(["recipe", *words])
        captured = capfd.readouterr()
        assert captured.out == ""
        return status, captured.err

    return run


def test_a_wrong_run_file_is_one_line_with_cause_and_advice(outcome: Callable[..., tuple[int, str]], tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("sede = 1\n")

    def load(path: Path, overrides: list[str]) -> Run:
        return config.load(path, overrides, Run)

    assert outcome(load, str(file)) == (2, f"baltoro: {file}: unknown key sede; did you mean seed?\n")
    file.write_text("seed = 1\n")
    assert outcome(load, str(file), "seed=x") == (2, f"baltoro: {file}: seed is a string ('x'); give an integer\n")
    assert outcome(load, str(file), "seed=2") == (0, "")
    absent = tmp_path / "absent.toml"
    advice = "give the path of a TOML run file"
    assert outcome(load, str(absent)) == (2, f"baltoro: run file {absent} does not exist; {advice}\n")
    assert outcome(load, str(tmp_path)) == (
        2,
        f"baltoro: Is a directory: {tmp_path}; mend this and run the same command again: it resumes\n",
    )


def test_a_full_disk_tells_to_free_space(outcome: Callable[..., tuple[int, str]]):
    def fill(file: Path, overrides: object) -> None:
        with open("/dev/full", "w", buffering=1) as device:  # the kernel's own full disk
            device.write("checkpoint\n")

    status, error = outcome(fill, "run.toml")
    assert status == 2
    assert error == "baltoro: No space left on device; free some space and run the same command again: it resumes\n"


def test_a_locked_run_folder_names_the_folder_and_the_cause(outcome: Callable[..., tuple[int, str]], tmp_path: Path):
    def lock(file: Path, overrides: object) -> None:
        with open(tmp_path / "lock", "w") as mine, open(tmp_path / "lock", "w") as theirs:
            fcntl.flock(theirs, fcntl.LOCK_EX)
            try:
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(error.errno, error.strerror, str(tmp_path)) from None

    status, error = outcome(lock, "run.toml")
    assert status == 2
    assert error.count("\n") == 1
    assert f"{tmp_path}; another process uses this run folder" in error


def test_a_missing_corpus_and_a_forbidden_folder_are_one_line(outcome: Callable[..., tuple[int, str]], tmp_path: Path):
    status, error = outcome(lambda file, overrides: os.listdir(tmp_path / "corpus"), "run.toml")
    assert (status, error) == (
        2,
        f"baltoro: No such file or directory: {tmp_path / 'corpus'}; check the path in run.toml and the overrides\n",
    )

    def forbidden(file: Path, overrides: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs")

    assert outcome(forbidden, "run.toml")[1].startswith("baltoro: Permission denied: /runs; ")


def test_a_message_of_several_lines_stays_one_line_and_keeps_its_own_advice(outcome: Callable[..., tuple[int, str]]):
    def fail(file: Path, overrides: object) -> None:
        raise ValueError("checkpoint step_3\nis truncated; delete it\n")

    assert outcome(fail, "run.toml") == (2, "baltoro: checkpoint step_3 is truncated; delete it\n")

    def terse(file: Path, overrides: object) -> None:
        raise ValueError("too few heads")

    assert outcome(terse, "run.toml") == (2, "baltoro: too few heads; correct run.toml or the overrides\n")


def test_the_traceback_is_there_for_who_asks(outcome: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch):
    def fail(file: Path, overrides: object) -> None:
        raise ValueError("x")

    monkeypatch.setenv("BALTORO_DEBUG", "1")
    with pytest.raises(ValueError, match="x"):
        outcome(fail, "run.toml")


def test_our_own_mistakes_keep_their_traceback(outcome: Callable[..., tuple[int, str]]):
    def fail(file: Path, overrides: object) -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        outcome(fail, "run.toml")

    def misname(file: Path, overrides: object) -> None:
        __import__("baltoro.no_such_module")

    with pytest.raises(ModuleNotFoundError):
        outcome(misname, "run.toml")


def test_without_the_training_packages_it_says_what_to_install(outcome: Callable[..., tuple[int, str]]):
    status, error = outcome(lambda file, overrides: __import__("no_such_torch.nn"), "run.toml")
    assert status == 2
    assert (
        error == "baltoro: the package no_such_torch is not installed; install it with: pip install 'baltoro[train]'\n"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "<command>"),
        (["recip", "x.toml"], "'recip'"),
        (["recipe"], "run.toml"),
        (["ablate", "adam", "x.toml"], "'parl'"),
        (["recipe", "x.toml", "--fast"], "--fast"),
        (["convert", "a", "b"], "--to"),
        (["convert", "a", "b", "--to", "fp8"], "'fp8'"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("baltoro: ")
    assert error.count("\n") == 1
    assert says in error
    assert "--help" in error


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert ("--to" if cli.COMMANDS[name].forms else "key=value") in shown
    example = cli.COMMANDS[name].example.split()
    assert " ".join(example) in shown
    given = cli._parser().parse_args(example[1:])  # the example is a valid command line
    assert given.command == name


def test_help_needs_neither_torch_nor_the_recipe():
    script = (
        "import sys; from baltoro import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'rich', 'baltoro.recipe'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_tells_how_to_resume():
    script = (
        "import sys, time\n"
        "from baltoro import cli\n"
        "def wait(file, overrides):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "cli.COMMANDS['recipe'] = cli.Command('waits', '', '', wait)\n"
        "sys.exit(cli.main(['recipe', 'nano.toml', 'seed=1']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "baltoro: interrupted; to resume, run again: baltoro recipe nano.toml seed=1\n"
        assert process.wait() == 130
