"""`baltoro serve` on checkpoints of random weights: the command itself, its signals, and what it loads."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from baltoro import cli, config
from baltoro.agent.engine import Sampling
from baltoro.chat.messages import user
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.config import NANO, Yarn
from baltoro.model.convert import save_release
from baltoro.model.init import initialise
from baltoro.model.kimi import KimiK25
from baltoro.recipe.commands import open_run
from baltoro.recipe.settings import RecipeConfig
from baltoro.rollout.record import read_episodes
from baltoro.serve.load import Loaded, ServeConfig, open_release
from baltoro.serve.local import LocalEngine
from baltoro.train.state import Progress, save_state

T = Tokenizer({bytes([b]): b for b in range(256)})
NANO_TOML = Path(__file__).parents[2] / "configs/nano.toml"


@pytest.fixture(scope="module")
def model() -> KimiK25:
    """Nano with random weights, exact in bfloat16."""
    yarn = Yarn(factor=4.0, original_max_position=512)
    text = dataclasses.replace(NANO.text, vocab_size=T.vocab_size, yarn=yarn)
    model = KimiK25(dataclasses.replace(NANO, text=text), T.media_pad)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.fixture(scope="module")
def run_folder(model: KimiK25, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a recipe leaves: the stages sft and rl are finished, parl is not."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    settings = config.load(NANO_TOML, [f"folder={folder}", "agents.rules.max_context_tokens=1024"], RecipeConfig)
    (folder / "config.json").write_text(json.dumps(config.dump(settings)))
    (folder / "results.json").write_text(json.dumps({"stages": {"sft": {}, "rl": {}}}))
    T.save(folder / "tokenizer.tiktoken")
    save_state(folder / "checkpoints/rl.safetensors", model, None, Progress("rl", 1, 1.0, 1))
    (folder / "checkpoints/parl.safetensors").write_bytes(b"")
    return folder


def _greedy(loaded: Loaded) -> tuple[list[int], list[float]]:
    prompt = render([user("What is it?")], loaded.tokenizer, loaded.media, add_generation_prompt=True)
    engine = LocalEngine({"m": loaded.model}, loaded.tokenizer, slots=1, max_len=256)

    async def ask() -> tuple[list[int], list[float]]:
        async with engine.run():
            completion = await engine.generate(prompt, Sampling(24, temperature=0.0), "m")
            return completion.ids, completion.logprobs

    return asyncio.run(ask())


def test_a_run_folder_and_the_released_layout_serve_the_same_model(
    model: KimiK25, run_folder: Path, tmp_path: Path
) -> None:
    save_release(model, tmp_path, "bf16")
    T.save(tmp_path / "tiktoken.model")
    settings = ServeConfig(threads=1, dtype="float32")
    run, release = open_run(run_folder, settings), open_release(tmp_path, settings)
    assert (run.context, release.context) == (1024, 2048)
    assert _greedy(run) == _greedy(release)
    # Pictures of the recipe are smaller than the release's; patches are the tower's.
    assert (run.media.patch_limit, release.media.patch_limit) == (256, 16384)
    assert (release.media.patch_size, release.media.merge) == (8, 2)


def test_a_folder_that_does_not_fit_is_named(run_folder: Path, tmp_path: Path, model: KimiK25) -> None:
    with pytest.raises(ValueError, match=r"has no checkpoint of vit; choose with stage= from: parl, rl$"):
        open_run(run_folder, ServeConfig(stage="vit"))
    with pytest.raises(ValueError, match=r"parl\.safetensors: truncated"):
        open_run(run_folder, ServeConfig(stage="parl"))
    save_release(model, tmp_path, "bf16")
    Tokenizer({bytes([b]): b for b in range(256)} | {b"ab": 256}).save(tmp_path / "tiktoken.model")
    with pytest.raises(ValueError, match=r"tiktoken\.model belongs to another model"):
        open_release(tmp_path, ServeConfig())


@contextlib.contextmanager
def _command(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the URL that it prints."""
    with subprocess.Popen(
        [sys.executable, "-m", "baltoro.cli", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield process, line.removeprefix("listening on ").strip()
        finally:
            process.kill()


def test_the_command_answers_and_drains(run_folder: Path) -> None:
    settings = ["port=0", "threads=1", "slots=2", "context=2048", "dtype=float32"]
    ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with (
        _command(str(run_folder), *settings, BALTORO_API_KEY="key") as (process, url),
        OpenAI(base_url=url, api_key="key", max_retries=0) as client,
    ):
        assert [m.id for m in client.models.list()] == ["tiny"]
        extra = {"return_token_ids": True}
        once, again = (
            client.chat.completions.create(**ask, max_tokens=12, seed=3, logprobs=True, extra_body=extra).model_dump()[
                "choices"
            ]
            for _ in range(2)
        )
        # The second prompt is read from the cache, so sums are rounded in another order.
        numbers = [[token.pop("logprob") for token in choice[0]["logprobs"]["content"]] for choice in (once, again)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
        assert once == again
        assert len(once[0]["token_ids"]) == len(once[0]["logprobs"]["content"]) == 12

        # Clients that leave: were they still served, both slots would be taken for two thousand tokens.
        left = [client.chat.completions.create(**ask, stream=True, temperature=0) for _ in range(2)]
        for stream in left:
            next(stream)
            stream.close()
        health = url.removesuffix("/v1") + "/health"
        client.chat.completions.create(**ask, max_tokens=2)
        with urllib.request.urlopen(health) as answer:
            assert json.load(answer) == {"status": "ok", "running": 0}

        stream = client.chat.completions.create(**ask, stream=True, max_tokens=150, seed=1)
        next(stream)
        metrics = urllib.request.Request(url.removesuffix("/v1") + "/metrics", headers={"Authorization": "Bearer key"})
        with urllib.request.urlopen(metrics) as answer:
            told = answer.read().decode()
        assert "baltoro_gateway_engine_running 1\n" in told
        assert "baltoro_gateway_engine_pages 256\n" in told  # two slots of 2048 tokens, 16 a page
        process.send_signal(signal.SIGTERM)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)) as refused:
            while True:  # until the signal has arrived
                client.chat.completions.create(**ask, max_tokens=1)
        assert isinstance(refused.value, openai.InternalServerError)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(health)
        assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_port_that_is_taken_is_one_line(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(run_folder), f"port={port}", "threads=1"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("baltoro: ")
    assert error.count("\n") == 1
    assert str(port) in error
    assert error.endswith("address already in use; choose another host= or port=\n")


ENV = """
from contextlib import asynccontextmanager

from baltoro.agent.loop import Limits
from baltoro.rollout.env import Env, World
from baltoro.rollout.judge import Judge, Reward


@asynccontextmanager
async def open_world(task, seed):
    yield World((f"say {task['word']}",))


env = Env(
    "say",
    "1",
    lambda seed: {"word": "ab"[seed % 2] * 3},
    open_world,
    Judge(Reward("said", lambda task, trace: float(trace.final_text == task["word"]))),
    Limits(max_turns=1, max_context_tokens=4096, max_turn_tokens=12),
)
"""


def test_an_environment_is_run_on_a_run_folder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "say.py").write_text(ENV)
    words = ["env", "run", "say.py", f"checkpoint={run_folder}", "tasks=3", "rollouts=2", "threads=1", "dtype=float32"]
    assert cli.main([*words, "stage=rl"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert f"say 1 by {run_folder} (rl.safetensors of " in out
    assert "contexts up to 1024 tokens" in out  # the model's
    assert "engine pages" in out
    recording = read_episodes(tmp_path / "runs/say/episodes.jsonl")
    assert sorted(record.group for record in recording.records) == ["0", "0", "1", "1", "2", "2"]
    assert recording.tokenizer.to_bytes() == T.to_bytes()
    assert cli.main(["trace", "verify", "runs/say/episodes.jsonl", "env=say.py"]) == 0
    # What was trained on since is another model.
    os.utime(run_folder / "checkpoints/rl.safetensors", (1, 1))
    assert cli.main([*words, "stage=rl"]) == 2
    assert "holds a run with another model" in capsys.readouterr().err
