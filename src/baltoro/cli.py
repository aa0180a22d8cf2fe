"""`baltoro <command> [run.toml] [key=value ...]`: the one boundary where a user's mistake becomes one line of text.

`baltoro convert` has folders and a format instead of a run file, `baltoro serve` a folder, `baltoro gateway` a file
of records."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from baltoro import config


@dataclass(frozen=True)
class Command:
    """`run(file, overrides)` imports what it needs when called: `baltoro --help` answers at once, without torch.

    `file` names and explains the first argument. With `forms` the command takes a source and a target folder, and
    `--to` one of the forms; `run(source, [target, form])`. With `subjects` (explained by `subject`) one of them comes
    before the file; `run(file, [subject, *overrides])`. `run` may return an exit status."""

    summary: str
    details: str
    example: str
    run: Callable[[Path, Sequence[str]], int | None]
    subjects: tuple[str, ...] = ()
    subject: str = "what to do"
    forms: tuple[str, ...] = ()
    file: tuple[str, str] = ("run.toml", "the run file, one of configs/ or your own")


def _recipe(file: Path, overrides: Sequence[str]) -> None:
    from baltoro.recipe.commands import run_recipe
    from baltoro.recipe.settings import RecipeConfig

    run_recipe(config.load(file, overrides, RecipeConfig))


def _ablate(file: Path, overrides: Sequence[str]) -> None:
    from baltoro.recipe.commands import ablate_parl
    from baltoro.recipe.settings import RecipeConfig

    ablate_parl(config.load(file, overrides[1:], RecipeConfig))


def _report(file: Path, overrides: Sequence[str]) -> None:
    from baltoro.recipe.commands import write_report
    from baltoro.recipe.settings import RecipeConfig

    write_report(config.load(file, overrides, RecipeConfig))


def _convert(source: Path, words: Sequence[str]) -> None:
    from baltoro.model.convert import convert
    from baltoro.report.progress import Progress

    target, form = words
    # Before the first minute has been measured, 200 MB a second are as good a guess as any.
    expected = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 200e6
    with Progress({"convert": expected}) as progress:
        begun = False

        def report(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                progress.stage("convert", f"{source} to {target} as {form}, in MB", -(-total // 10**6))
                begun = True
            progress.update(done // 10**6, {})

        damaged = convert(source, Path(target), form, report)
    for file in damaged:
        print(f"{Path(target) / file} was damaged and has been written again")
    print(f"{target} is whole; its checksums are in {target}/SHA256SUMS")


def _serve(target: Path, overrides: Sequence[str]) -> None:
    from baltoro.recipe.commands import open_model
    from baltoro.serve.load import ServeConfig, serve_model

    settings = config.from_overrides(overrides, ServeConfig)
    loaded = open_model(target, settings)
    serve_model(loaded, settings, settings.name or loaded.folder.resolve().name)


@dataclass(frozen=True)
class EnvSettings:
    """`baltoro env`. seed: of the task to play; pictures: the folder that they are written into. check_s: seconds that
    one check may take."""

    seed: int = 0
    pictures: Path = Path("play")
    check_s: float = 120.0


def _env(file: Path, words: Sequence[str]) -> int:
    if words[0] == "run":
        return _env_run(file, words[1:])
    settings = config.from_overrides(words[1:], EnvSettings)
    return {"new": _env_new, "check": _env_check, "play": _env_play}[words[0]](file, settings)


def _env_new(file: Path, settings: EnvSettings) -> int:
    from importlib.resources import files

    path = file.with_suffix(".py")
    if path.exists():
        raise ValueError(f"{path} exists; choose another name")
    text = files("baltoro.rollout").joinpath("new_env.py.txt").read_text(encoding="utf-8")
    path.write_text(text.replace("NAME", path.stem), encoding="utf-8")
    print(f"{path} is an environment; try it: baltoro env check {path}, baltoro env play {path}")
    return 0


def _env_check(file: Path, settings: EnvSettings) -> int:
    import asyncio
    import faulthandler

    from baltoro.rollout.conform import conform, load_env

    env = load_env(file)
    # An environment that blocks the loop for good could not be stopped otherwise; the traceback shows where it hangs.
    checks = asyncio.run(conform(env, lambda name: faulthandler.dump_traceback_later(settings.check_s, exit=True)))
    faulthandler.cancel_dump_traceback_later()
    for check in checks:
        print(f"{'fault' if check.faults else 'ok':5} {check.name}")
        for fault in check.faults:
            print(f"      {fault}")
    faults = sum(len(check.faults) for check in checks)
    verdict = f"{faults} faults" if faults else "conforms to version 1 of the interface"
    print(f"{env.name} {env.version}: {verdict}")
    return min(faults, 1)


def _env_play(file: Path, settings: EnvSettings) -> int:
    import asyncio

    from baltoro.rollout.conform import load_env
    from baltoro.rollout.play import play

    def read(prompt: str) -> str:
        try:
            return input(prompt)
        except EOFError:
            return "quit"

    asyncio.run(play(load_env(file), settings.seed, settings.pictures, read, print, sys.stdout.isatty()))
    return 0


def _env_run(file: Path, overrides: Sequence[str]) -> int:
    from rich.console import Console

    from baltoro.rollout.conform import load_env
    from baltoro.rollout.roll_out import RollOutConfig, remote, roll_out
    from baltoro.rollout.summary import lines

    settings = config.from_overrides(overrides, RollOutConfig)
    env, folder = load_env(file), settings.folder or Path("runs") / file.stem
    if settings.checkpoint is None:
        served = remote(settings)
    else:
        from baltoro.recipe.commands import open_model
        from baltoro.serve.load import ServeConfig, local

        opened = ServeConfig(stage=settings.stage, threads=settings.threads, dtype=settings.dtype)
        served = local(open_model(settings.checkpoint, opened), settings.slots, settings.context)
    out = roll_out(env, served, settings, folder, Console())
    print("\n".join(lines(out.records, settings.rollouts, out.faults)))
    print(f"{folder}/episodes.jsonl; show it: baltoro trace view {folder}/episodes.jsonl")
    return min(out.faults.total(), 1)


def _trace(file: Path, words: Sequence[str]) -> int:
    from baltoro.rollout.trace_command import TraceSettings, trace

    return trace(words[0], file, config.from_overrides(words[1:], TraceSettings))


def _gateway(file: Path, overrides: Sequence[str]) -> None:
    from baltoro.rollout.gateway.command import GatewayConfig, run_gateway

    run_gateway(file, config.from_overrides(overrides, GatewayConfig))


COMMANDS = {
    "recipe": Command(
        "run the whole recipe, stage after stage, and write the report",
        "Trains the vision tower, then text and vision together, then long context, then supervised and\n"
        "reinforcement learning of agents and of the swarm's orchestrator; then evaluates and writes the report\n"
        "(HTML and results.json) into the run folder. A stage that is complete in the run folder is not repeated,\n"
        "and an interrupted one continues where it stopped: to resume, run the same command again.",
        "baltoro recipe configs/nano.toml seed=1",
        _recipe,
    ),
    "ablate": Command(
        "leave out one part of a method and show what it was for",
        "parl: trains the orchestrator once without r_parallel and once without r_finish, from the supervised\n"
        "checkpoint of a finished recipe, and compares accuracy and parallelism with the full reward.",
        "baltoro ablate parl configs/nano.toml",
        _ablate,
        subjects=("parl",),
        subject="what to leave parts out of",
    ),
    "report": Command(
        "write the report of a finished run again, from its records",
        "Reads the records in the run folder and writes the HTML file anew; trains nothing.",
        "baltoro report configs/nano.toml",
        _report,
    ),
    "convert": Command(
        "convert a checkpoint between the released layouts and transformers' own",
        "SOURCE is a folder with config.json and safetensors files in any of the three formats, such as the released\n"
        "Kimi-K2.5; TARGET is a new folder. Formats: int4 (as released: routed experts in four bits, groups of 32),\n"
        "bf16 (the same names, all in bfloat16), hf (as transformers names and stacks them). Weights stream through,\n"
        "a few rows at a time: a gigabyte of memory is enough for the whole release.\n"
        "To resume an interrupted conversion run the same command again: finished shards are verified and kept.\n"
        "Run it again after its end to verify TARGET. SOURCE is verified too if it has SHA256SUMS (which\n"
        "`sha256sum -c SHA256SUMS` reads as well).",
        "baltoro convert Kimi-K2.5 Kimi-K2.5-bf16 --to bf16",
        _convert,
        forms=("bf16", "int4", "hf"),
    ),
    "env": Command(
        "write, check, play or run an environment",
        "new FILE: writes a small environment that runs at once, to be changed into your own.\n"
        "check FILE: puts an environment to the test of the interface: the same under the same seed, typed\n"
        "observations, valid tools, instances that share nothing, reset after close, finite named rewards, bounded\n"
        "steps that do not hold up others, nothing left after a cancellation. Exit status 1 if it has faults, or if a\n"
        "check hangs for check_s= seconds: then with a traceback that shows where.\n"
        "play FILE: you are the agent. seed= chooses the task, pictures= the folder for the pictures.\n"
        "run FILE: a model is the agent. tasks= of them, from seed= on, are played rollouts= times each; then means\n"
        "over tasks are told with standard errors. upstream=URL model=NAME tokenizer=tiktoken.model is a server\n"
        "that reads token ids (kind=vllm or sglang; URL without /v1, its key in BALTORO_UPSTREAM_KEY), or\n"
        "checkpoint=FOLDER is what `baltoro serve` would serve (stage, slots, threads, dtype as there). Further\n"
        "settings: context, calls (of the engine, at once), temperature, top_p, thinking. folder= (runs/NAME) gets\n"
        "episodes.jsonl, which `baltoro trace` reads, and a journal. To resume, run the same command again; with more\n"
        "tasks or rollouts, only those are added. Exit status 1 if episodes are missing because something failed.\n"
        "An environment is a Python file that says `env = Env(...)`; check, play and run execute it.",
        "baltoro env run desktop.py checkpoint=runs/nano tasks=16 rollouts=4",
        _env,
        subjects=("new", "check", "play", "run"),
        file=("FILE", "the environment's Python file"),
    ),
    "trace": Command(
        "verify, show or export recorded episodes",
        "verify FILE: recomputes what training relies on, and prints one line for everything that is wrong: turns\n"
        "that do not extend the tokens before them, masks and log-probabilities that do not fit, media tokens against\n"
        "grids and pixels, control tokens within text, rewards, draws that are trained on twice; then, by role, what\n"
        "evidence is missing. env=FILE judges the episodes again. Exit status 1 if anything is wrong.\n"
        "view FILE: writes one HTML file beside it, or where to= says, that shows groups, episodes and agents token\n"
        "by token, coloured by loss mask, log-probability, advantage or mismatch. It needs no network.\n"
        "perfetto FILE: writes when which agent did what, for ui.perfetto.dev, beside it or where to= says.\n"
        "export FILE form=slime (or trl): writes trainable agents for another trainer, a JSON line each, token by\n"
        "token; those that saw pictures or video are left out.\n"
        "FILE is a .jsonl file that a run wrote, with the folder of the same name beside it.",
        "baltoro trace verify runs/nano/episodes/rl.jsonl",
        _trace,
        subjects=("verify", "view", "perfetto", "export"),
        file=("FILE", "a file of episodes"),
    ),
    "serve": Command(
        "answer requests of OpenAI's and Anthropic's clients with a trained model",
        "FOLDER is the folder of a run, or a checkpoint in the released layout with its tiktoken.model; a run file\n"
        "stands for its run's folder. POST /v1/chat/completions takes text, images and videos (as data: URLs), tools,\n"
        'stream, stop, n, seed, logprobs, return_token_ids, and chat_template_kwargs={"thinking": false} for instant\n'
        "mode; /v1/messages and /v1/responses are the other dialects. Under /sessions/NAME/v1 calls are recorded as\n"
        "`baltoro gateway` records them, in memory.\n"
        "Settings are host, port, name (of the model), stage (of the run), context, slots (completions in the batch),\n"
        "queue (completions that may wait), body_mb, threads and dtype. If BALTORO_API_KEY is set in the environment,\n"
        "requests must bear it. SIGTERM or Ctrl-C lets running requests finish; a second one does not.",
        "baltoro serve runs/nano port=8000",
        _serve,
        file=("FOLDER", "the folder of a run or of a checkpoint, or a run file"),
    ),
    "gateway": Command(
        "record what black-box agents say to a model, token by token",
        "Agents are given base_url=http://host:port/sessions/NAME/v1 (Anthropic's clients: without /v1) and speak\n"
        "OpenAI's chat completions or responses, or Anthropic's messages. Every call is kept in FILE before it is\n"
        "answered; GET /sessions/NAME tells it to whoever has the admin key. /v1 without a session keeps nothing.\n"
        "Settings: upstream (URL) and model are required; kind is chat (an endpoint with vLLM's return_token_ids),\n"
        "text (any other: only text is kept), vllm or sglang (by token ids; give tokenizer=tiktoken.model); further\n"
        "context, host, port, calls, key_calls (completions at once) and body_mb.\n"
        "The environment holds the secrets: BALTORO_API_KEY (one or several, with commas between), BALTORO_ADMIN_KEY\n"
        "(for POST /admin/pause, resume and drain, and for sessions) and BALTORO_UPSTREAM_KEY.",
        "baltoro gateway calls.db upstream=http://localhost:8000/v1 model=kimi",
        _gateway,
        file=("FILE", "an SQLite file, made where there is none"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 what was examined has faults, 2 a user's mistake (one line on stderr; with
    BALTORO_DEBUG=1 a traceback), 130 Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = _parser().parse_args(words)
    file: Path = given.file
    subject = [given.subject] if "subject" in given else []
    try:
        run = COMMANDS[given.command].run
        return run(file, [given.target, given.to] if "to" in given else [*subject, *given.overrides]) or 0
    except KeyboardInterrupt:
        return _say(f"interrupted; to resume, run again: baltoro {' '.join(words)}", 130)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("BALTORO_DEBUG") or (isinstance(error, ModuleNotFoundError) and _ours(error)):
            raise
        return _say(_explain(error, file), 2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(_say(f"{message}; see {self.prog} --help", 2))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="baltoro",
        description="Train, run and evaluate a multimodal agent and its swarm: a command, a run file, overrides.",
        epilog="`baltoro <command> --help` tells what a command does. BALTORO_DEBUG=1 shows the traceback of an error.",
    )
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.\n\n{command.details}",
            epilog=f"example: {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.forms:
            one.add_argument("file", type=Path, metavar="SOURCE", help="the folder of a checkpoint")
            one.add_argument("target", metavar="TARGET", help="a new folder, or that of an interrupted conversion")
            one.add_argument("--to", choices=command.forms, required=True, help="the format of TARGET")
            continue
        if command.subjects:
            one.add_argument("subject", choices=command.subjects, help=command.subject)
        metavar, meaning = command.file
        one.add_argument("file", type=Path, metavar=metavar, help=meaning)
        one.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="a setting, or what replaces a value of the run file, as in TOML; a dot enters a table: table.key=0.5",
        )
    return parser


def _say(text: str, status: int) -> int:
    print(f"baltoro: {' '.join(text.split())}", file=sys.stderr)
    return status


def _ours(error: ModuleNotFoundError) -> bool:
    return (error.name or "baltoro").partition(".")[0] == "baltoro"


def _explain(error: ValueError | OSError | ModuleNotFoundError, file: Path) -> str:
    """`<cause>; <what to do>`. An error that already carries its advice after a semicolon keeps it."""
    text = str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed; install it with: pip install 'baltoro[train]'"
    if not isinstance(error, OSError) or error.errno is None:
        return text if ";" in text else f"{text}; correct {file} or the overrides"
    cause = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{cause}; free some space and run the same command again: it resumes"
    if isinstance(error, BlockingIOError):
        return f"{cause}; another process uses this run folder: wait for it, stop it, or name another folder"
    if isinstance(error, FileNotFoundError):
        return f"{cause}; check the path in {file} and the overrides"
    return f"{cause}; mend this and run the same command again: it resumes"


if __name__ == "__main__":
    sys.exit(main())
