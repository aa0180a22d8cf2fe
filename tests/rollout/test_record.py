"""What is written is what is read: bit for bit, whatever was in it, and whatever happened to the writer."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from baltoro.agent.trace import Trace, Turn
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Clip, Image, MediaItem, Message, ToolCall, Video, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.record import Record, agents, read_episodes, write_episodes

bytes3 = arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)))
texts = st.text(st.characters(exclude_categories=()), max_size=12)
parts = st.one_of(
    texts,
    st.builds(Image, bytes3),
    st.builds(
        Clip, arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(2), st.just(2), st.just(3))), st.floats(0.5, 60)
    ),
    st.builds(Video, st.one_of(st.binary(max_size=9), st.just(Path("/a/film.mp4")))),
)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.lists(parts, max_size=3).map(tuple),
    texts,
    st.lists(st.builds(ToolCall, texts, texts, texts), max_size=2).map(tuple),
    texts,
    texts,
)
ids = st.lists(st.integers(0, 200_000), max_size=6).map(tuple)
numbers = st.floats(width=64)
logprobs = st.lists(numbers, max_size=6).map(tuple)
items = st.builds(MediaItem, arrays(np.float32, (4, 3, 2, 2)), st.just((1, 2, 2)))
signals = st.dictionaries(texts, numbers, max_size=3)
seconds = st.floats(0, 1e6)


def turns(children: st.SearchStrategy[tuple[Trace, ...]]) -> st.SearchStrategy[Turn]:
    return st.builds(
        Turn, st.integers(0, 5), ids, logprobs, st.integers(-1, 9), messages, st.lists(messages, max_size=2).map(tuple),
        children, seconds, seconds, seconds,
    )  # fmt: skip


@st.composite
def traces(draw: st.DrawFn, depth: int) -> Trace:
    children = st.lists(traces(depth - 1), max_size=2).map(tuple) if depth else st.just(())
    below = draw(st.lists(turns(children), max_size=2).map(tuple))
    said = [m for turn in below for m in (turn.message, *turn.results)]
    return Trace(
        draw(texts), (*draw(st.lists(messages, max_size=2)), *said), draw(ids),
        draw(st.lists(st.integers(0, 1), max_size=6).map(tuple)), draw(logprobs),
        draw(st.lists(items, max_size=1).map(tuple)),
        below, draw(st.sampled_from(["completed", "limit", "overflow", "failed"])), draw(texts), draw(st.booleans()),
        draw(texts), draw(signals), draw(st.dictionaries(texts, texts, max_size=2)), draw(texts),
    )  # fmt: skip


rows = st.dictionaries(texts, st.one_of(st.integers(), texts, st.lists(texts, max_size=2)), max_size=3)
records = st.builds(
    Record, texts, texts, rows, texts, st.integers(0, 2**63), traces(2), signals,
    st.none() | numbers, st.none() | numbers, st.lists(logprobs, max_size=2).map(tuple),
)  # fmt: skip


def plain(value: Any) -> Any:
    """Comparable: NaN equals NaN, arrays are their type, shape and bytes."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__, {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [plain(item) for item in value]
    return (type(value).__name__, repr(value))


@settings(max_examples=20)
@given(st.lists(records, max_size=3), st.lists(records, max_size=2))
def test_read_gives_what_was_written(first: list[Record], second: list[Record]) -> None:
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deep", "rl.jsonl")
        for batch in (first, second):
            write_episodes(path, batch, tokenizer, MediaSpec.K25)
        recording = read_episodes(path)
        assert plain(recording.records) == plain([*first, *second])
        assert recording.media_spec == MediaSpec.K25
        assert recording.tokenizer.to_bytes() == tokenizer.to_bytes()


def example(tokens: int = 3) -> Record:
    opening = user("look", Image(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))
    answer = Message("assistant", ("seen",))
    turn = Turn(2, (7,), (-0.5,), 4, answer, (), (), 0.0, 1.0, 2.0)
    filler = tuple(range(tokens - 1))
    trace = Trace(
        "agent", (opening, answer), (*filler, 7), (*[0] * len(filler), 1), (*[0.0] * len(filler), -0.5), (), (turn,),
        "completed", "seen", True, signals={"perf": 1.0},
    )  # fmt: skip
    return Record("look", "1", {"gold": "seen"}, "g", 1, trace, {"perf": 1.0}, 1.0)


def test_a_message_is_one_object_again_and_a_token_is_written_once(
    tmp_path: Path, tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    path = tmp_path / "rl.jsonl"
    write_episodes(path, [example()] * 4, tokenizer, media_spec)
    trace = read_episodes(path).records[0].trace
    assert trace.turns[0].message is trace.messages[1]
    line = json.loads(path.read_text().splitlines()[1])["trace"]
    assert (line["turns"][0]["sampled"], len(line["messages"])) == (1, 2)
    assert sorted(file.suffix for file in (tmp_path / "rl.files").iterdir()) == [".png", ".tiktoken"]


def test_places_of_agents() -> None:
    leaf = example().trace
    turn = dataclasses.replace(leaf.turns[0], children=(leaf, leaf))
    root = dataclasses.replace(leaf, turns=(turn, dataclasses.replace(turn, children=(leaf,))))
    assert [place for place, _ in agents(root)] == ["0", "0.0", "0.1", "0.2"]


@pytest.mark.parametrize("torn", [1, 30, 10_000])
def test_a_torn_tail_is_neither_read_nor_built_upon(
    tmp_path: Path, tokenizer: Tokenizer, media_spec: MediaSpec, torn: int
) -> None:
    """Cut anywhere in the last line: the lines before it stand, and the next append is whole."""
    path = tmp_path / "rl.jsonl"
    write_episodes(path, [example(), example(40_000)], tokenizer, media_spec)
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn])
    assert len(read_episodes(path).records) == 1
    write_episodes(path, [example(40_000)], tokenizer, media_spec)
    assert path.read_bytes() == whole


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    """kill -9 while a process writes one episode after another: every line that is read is one that was written."""
    path = tmp_path / "rl.jsonl"
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path; from test_record import example\n"
        "from baltoro.rollout.record import write_episodes; from baltoro.chat.media import MediaSpec\n"
        "from baltoro.chat.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer({bytes([b]): b for b in range(256)})\n"
        "print('go', flush=True)\n"
        "while True: write_episodes(Path(sys.argv[1]), [example(60_000)] * 2, tokenizer, MediaSpec.K25)\n"
    )
    here = Path(__file__)
    command = [sys.executable, "-c", program, str(path), str(here.parent), str(here.parents[2] / "src")]
    for delay in (0.15, 0.3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stdout.readline() == b"go\n"
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
    found = read_episodes(path).records
    assert found
    assert {len(record.trace.tokens) for record in found} == {60_000}


def test_what_is_no_recording_is_told_by_name_and_line(
    tmp_path: Path, tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    path = tmp_path / "rl.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"rl.jsonl is no file of episodes"):
        read_episodes(path)
    path.unlink()
    write_episodes(path, [example()], tokenizer, media_spec)
    text = path.read_text()
    for wrong in ("../../etc/passwd", "0" * 31):
        path.write_text(text.replace('"image":"', f'"image":"{wrong}'))
        with pytest.raises(ValueError, match=r"line 2 is no episode .*is no hash"):
            read_episodes(path)
    path.write_text(text)
    with pytest.raises(ValueError, match="another tokenizer or other media"):
        write_episodes(path, [example()], tokenizer, MediaSpec.K25)
    assert len(read_episodes(path).records) == 1
