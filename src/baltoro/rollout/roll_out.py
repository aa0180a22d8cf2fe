"""Tasks by rollouts: every episode of an environment that was asked for, kept in a folder that goes on where it stopped
(`baltoro env run`).

The folder holds `episodes.jsonl`, as `record` writes it, and the journal of what the engine has answered: an episode
that was cut is run again and is answered from the journal; one that is in the file is not run again.
"""

import asyncio
import fcntl
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from rich.console import Console

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.loop import derive_seed
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.env import Env
from baltoro.rollout.journal import Journal
from baltoro.rollout.judge import Policy, Task
from baltoro.rollout.live import watched
from baltoro.rollout.manager import ManagerConfig, RolloutManager, Running
from baltoro.rollout.partial import resumable
from baltoro.rollout.record import Record, read_episodes, write_episodes
from baltoro.rollout.remote import UPSTREAM_KEY, remote_engine

_OURS = "run"  # in the journal; episodes have a number before a slash


@dataclass(frozen=True)
class RollOutConfig:
    """`baltoro env run`. tasks: those of `seed` and of the numbers that follow, as `env play seed=` shows them, each
    played by `rollouts` episodes. upstream, model, kind, tokenizer: as of `baltoro gateway`, for a server that reads
    token ids. checkpoint: instead of a server, what `baltoro serve` serves; stage, slots, threads, dtype: as there.
    context: the most tokens of prompt and completion together, by default the model's. calls: of the engine, at once.
    folder: by default runs/NAME, after the file of the environment."""

    tasks: int = 8
    rollouts: int = 4
    seed: int = 0
    folder: Path | None = None
    upstream: str = ""
    model: str = ""
    kind: Literal["vllm", "sglang"] = "vllm"
    tokenizer: Path | None = None
    checkpoint: Path | None = None
    stage: str = ""
    slots: int = 16
    threads: int = 0
    dtype: str = "auto"
    context: int = 0
    calls: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    thinking: bool = True

    def __post_init__(self) -> None:
        if bool(self.upstream) == bool(self.checkpoint):
            raise ValueError("who answers? give upstream= (a model server) or else checkpoint= (a folder); see --help")
        if self.upstream and not self.model:
            raise ValueError("key model is missing; give the name that the server knows")
        if min(self.tasks, self.rollouts, self.calls) < 1:
            raise ValueError("tasks, rollouts and calls are at least 1; give more")


@dataclass(frozen=True, eq=False)
class Served:
    """Who answers. name: tells weights apart. `engine` works while `running` is entered, for every role. context: the
    most tokens of prompt and completion together. numbers: gauges of the engine, for who watches."""

    name: str
    engine: Engine
    running: AbstractAsyncContextManager[None]
    tokenizer: Tokenizer
    media: MediaSpec
    context: int
    numbers: Callable[[], Mapping[str, float]] = dict[str, float]


@dataclass(frozen=True, eq=False)
class RolledOut:
    """records: of the episodes that were asked for, in order; those that failed are missing. faults: why, and how many
    did so."""

    records: list[Record]
    faults: Counter[str]


def remote(config: RollOutConfig) -> Served:
    """Raises ValueError where the tokenizer is missing or broken; entering `running`, ConnectionError."""
    key = os.environ.get(UPSTREAM_KEY, "")
    engine, tokenizer = remote_engine(config.kind, config.upstream, config.model, config.tokenizer, key)

    @asynccontextmanager
    async def running() -> AsyncGenerator[None]:
        async with engine.run():
            await engine.reach()
            yield

    return Served(config.model, engine, running(), tokenizer, MediaSpec.K25, config.context or 262_144)


def roll_out(env: Env, served: Served, config: RollOutConfig, folder: Path, console: Console) -> RolledOut:
    """Raises ValueError for a folder that holds something else or is in use, ConnectionError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        try:
            return asyncio.run(_roll_out(env, served, config, folder, console))
        except BaseExceptionGroup as group:
            raise _first(group) from None


async def _roll_out(env: Env, served: Served, config: RollOutConfig, folder: Path, console: Console) -> RolledOut:
    file = folder / "episodes.jsonl"
    context = min(env.limits.max_context_tokens, served.context)
    env = replace(env, limits=replace(env.limits, max_context_tokens=context))
    sampling = Sampling(env.limits.max_turn_tokens, config.temperature, config.top_p)
    policy = Policy(served.tokenizer, served.media, sampling, thinking=config.thinking)
    faults = Counter[str]()
    async with Journal.open(folder / "journal") as journal:
        await _check(journal, folder, _settings(env, served.name, config))
        write_episodes(file, (), served.tokenizer, served.media)
        there = set(_by_place(file))
        wanted = [episode for episode in _episodes(config) if episode.place not in there]
        console.print(_headline(env, served.name, config, len(wanted)), markup=False, highlight=False, soft_wrap=True)
        if wanted:
            await _play(env, policy, served, config, wanted, _Kept(journal, file, faults), console)
    records = _by_place(file)
    places = [episode.place for episode in _episodes(config)]
    return RolledOut([records[place] for place in places if place in records], faults)


@dataclass(frozen=True)
class _Episode:
    """`number` of the episodes of the task that `sample(of)` gives."""

    of: int
    number: int

    @property
    def id(self) -> str:
        return f"{self.of}/{self.number}"

    @property
    def place(self) -> tuple[str, int]:
        """Group and seed in the file."""
        return str(self.of), derive_seed(self.of, self.number)

    def task(self, env: Env) -> Task:
        return env.sample(self.of)

    def rollout(self, env: Env, policy: Policy) -> Callable[[Engine], Awaitable[Trace]]:
        return lambda engine: env.rollout(engine, policy, self.task(env), self.place[1])


def _by_place(file: Path) -> dict[tuple[str, int], Record]:
    return {(record.group, record.seed): record for record in read_episodes(file).records}


def _episodes(config: RollOutConfig) -> list[_Episode]:
    numbers = range(config.seed, config.seed + config.tasks)
    return [_Episode(of, number) for of in numbers for number in range(config.rollouts)]


@dataclass(frozen=True, eq=False)
class _Kept:
    """Where episodes go: answers to the journal, those that ended to the file, why others did not to `faults`."""

    journal: Journal
    file: Path
    faults: Counter[str]


async def _play(
    env: Env,
    policy: Policy,
    served: Served,
    config: RollOutConfig,
    wanted: list[_Episode],
    kept: _Kept,
    console: Console,
) -> None:
    manager = RolloutManager(served.engine, ManagerConfig(calls=config.calls))
    ended = asyncio.Queue[Record | None]()

    async def attend(running: Running, episode: _Episode) -> None:
        end = await running.ended()
        if end.trace is None or end.outcome == "failed":
            why = end.trace.error if end.trace else f"{type(end.error).__name__}: {end.error}"
            kept.faults[f"{end.outcome}: {why}"] += 1
            return
        reward, weights = env.judge.reward(end.trace.signals), env.judge.weights
        task, (group, seed) = episode.task(env), episode.place
        ended.put_nowait(Record(env.name, env.version, task, group, seed, end.trace, weights, reward))

    async with asyncio.TaskGroup() as writing:
        writing.create_task(_write(ended, kept.file, served))
        async with (
            served.running,
            manager.run(),
            watched(manager, console, served.numbers),
            asyncio.TaskGroup() as attending,
        ):
            for episode in wanted:
                running = await manager.submit(episode.id, resumable(kept.journal, episode.rollout(env, policy)))
                attending.create_task(attend(running, episode))
        ended.put_nowait(None)


async def _write(ended: "asyncio.Queue[Record | None]", file: Path, served: Served) -> None:
    """Until None comes; all that waits in one go."""
    going_on = True
    while going_on:
        batch = [await ended.get()]
        while not ended.empty():
            batch.append(ended.get_nowait())
        going_on = None not in batch
        records = [record for record in batch if record is not None]
        await asyncio.to_thread(write_episodes, file, records, served.tokenizer, served.media)


def _settings(env: Env, model: str, config: RollOutConfig) -> dict[str, object]:
    """What all episodes of a folder share. More tasks and rollouts may come, and the server may move."""
    return {
        "environment": f"{env.name} {env.version}",
        "model": model,
        "context": env.limits.max_context_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "thinking": config.thinking,
    }


async def _check(journal: Journal, folder: Path, settings: dict[str, object]) -> None:
    known = (await journal.records(_OURS)).get(b"settings")
    if known is None and not journal.episodes and not (folder / "episodes.jsonl").exists():
        journal.put(_OURS, b"settings", json.dumps(settings).encode())
        await journal.written()
        return
    before: dict[str, object] = json.loads(known) if known else {}
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        name = changed[0]
        held = f"a run with another {name} ({before.get(name)}, not {settings[name]})" if before else "something else"
        raise ValueError(f"{folder} holds {held}; choose another folder= or delete this one")


def _headline(env: Env, model: str, config: RollOutConfig, wanted: int) -> str:
    asked = config.tasks * config.rollouts
    there = f", {asked - wanted} episodes of {asked} are there" if wanted < asked else ""
    return (
        f"{env.name} {env.version} by {model}: tasks {config.seed} to {config.seed + config.tasks - 1}, "
        f"{config.rollouts} episodes each, contexts up to {env.limits.max_context_tokens} tokens{there}"
    )


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run; wait for it or choose another folder=") from None
        yield


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = cast(BaseExceptionGroup[BaseException], error).exceptions[0]
    return error
