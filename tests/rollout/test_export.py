"""One small episode, its lines for TRL and slime worked by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baltoro import cli
from baltoro.agent.trace import Trace, Turn
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import MediaItem, Message, tool_result
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.record import Record, write_episodes

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})  # a token is a byte


def turn(prompt_len: int, ids: bytes, logprobs: tuple[float, ...], version: int, **more: Any) -> Turn:
    fields: dict[str, Any] = {"results": (), "children": (), **more}
    message = Message("assistant", (ids.decode(),))
    return Turn(prompt_len, tuple(ids), logprobs, version, message, started=0.0, generated=1.0, ended=2.0, **fields)


def agent(role: str, tokens: bytes, mask: str, logprobs: tuple[float, ...], *turns: Turn, **more: Any) -> Trace:
    fields: dict[str, Any] = {"status": "completed", "trainable": True, "media": (), **more}
    loss_mask = tuple(map(int, mask))
    return Trace(role, (), tuple(tokens), loss_mask, logprobs, turns=turns, final_text="", **fields)


# The main agent reads "ask", calls ("go"), reads the result ("=4") and answers ("ok"), under newer weights. Its call
# ran a subagent that is trained too, one that is frozen, and one that never spoke.
SUB = agent("sub", b"qxy", "011", (0.0, -0.5, -1.5), turn(1, b"xy", (-0.5, -1.5), 7), status="limit")
FROZEN = replace(SUB, trainable=False)
SILENT = agent("sub", b"q", "0", (0.0,), status="failed")
FIRST = turn(3, b"go", (-1.0, -2.0), 7, results=(tool_result("c", "=4"),), children=(FROZEN, SUB, SILENT))
MAIN = agent(
    "main", b"askgo=4ok", "000110011", (0.0, 0.0, 0.0, -1.0, -2.0, 0.0, 0.0, -0.25, -0.125),
    FIRST, turn(7, b"ok", (-0.25, -0.125), 8),
)  # fmt: skip
EPISODE = Record("sums", "2", {"gold": 4}, "g", 11, MAIN, {"right": 1.0}, 0.75, 0.25)
SAW = replace(SUB, media=(MediaItem(np.zeros((4, 3, 2, 2), np.float32), (1, 2, 2)),))
RECORDS = [
    replace(EPISODE, group="f", trace=SUB, reward=None),  # its judge failed
    EPISODE,
    replace(EPISODE, seed=12, trace=SAW),
    replace(EPISODE, seed=13, trace=SUB, reward=-1.0),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rl.jsonl"
    write_episodes(path, RECORDS, TOKENIZER, MediaSpec.K25)
    return path


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def about(seed: int, episode: int, agent: str, role: str) -> dict[str, object]:
    return {"env": "sums", "version": "2", "group": "g", "seed": seed, "episode": episode, "agent": agent, "role": role}


def test_trl(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "export", str(file), "form=trl"]) == 0
    target = file.with_suffix(".trl.jsonl")
    assert capsys.readouterr().out == f"{target}: 3 agents; left out, because pixels cannot cross: 1\n"
    main = {
        "prompt_ids": [97, 115, 107],
        "completion_ids": [103, 111, 61, 52, 111, 107],
        "logprobs": [-1.0, -2.0, 0.0, 0.0, -0.25, -0.125],
        "env_mask": [1, 1, 0, 0, 1, 1],
        "weight_versions": [7, 8],
        "reward": 0.75,
        **about(11, 1, "0", "main"),
    }
    sub = {
        "prompt_ids": [113],
        "completion_ids": [120, 121],
        "logprobs": [-0.5, -1.5],
        "env_mask": [1, 1],
        "weight_versions": [7],
        "reward": 0.75,
    }
    alone = sub | {"reward": -1.0} | about(13, 3, "0", "sub")
    assert lines(target) == [main, sub | about(11, 1, "0.1", "sub"), alone]


def test_slime(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "samples"
    assert cli.main(["trace", "export", str(file), "form=slime", f"to={target}"]) == 0
    main = {
        "tokens": [97, 115, 107, 103, 111, 61, 52, 111, 107],
        "response_length": 6,
        "loss_mask": [1, 1, 0, 0, 1, 1],
        "rollout_log_probs": [-1.0, -2.0, 0.0, 0.0, -0.25, -0.125],
        "weight_versions": ["7", "8"],
        "status": "completed",
        "reward": 0.75,
        "metadata": about(11, 1, "0", "main"),
        "group_index": 1,
        "index": 0,
        "rollout_id": 1,
        "prompt": "ask",
        "response": "go=4ok",
    }
    sub = {
        "tokens": [113, 120, 121],
        "response_length": 2,
        "loss_mask": [1, 1],
        "rollout_log_probs": [-0.5, -1.5],
        "weight_versions": ["7"],
        "status": "truncated",
        "reward": 0.75,
        "metadata": about(11, 1, "0.1", "sub"),
        "group_index": 1,
        "index": 1,
        "rollout_id": 1,
        "prompt": "q",
        "response": "xy",
    }
    third = {"reward": -1.0, "metadata": about(13, 3, "0", "sub"), "index": 2, "rollout_id": 3}
    assert lines(target) == [main, sub, sub | third]


def test_the_form_must_be_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "export", str(file)]) == 2
    assert "say form=slime or form=trl" in capsys.readouterr().err
