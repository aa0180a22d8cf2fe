"""Traces as JSON, and media by hash."""

import json

import numpy as np

from baltoro.agent.trace import Trace, Turn, media_by_hash, media_hash
from baltoro.chat.messages import Clip, Image, Message, ToolCall, assistant, tool_result, user


def trace(messages: list[Message], turns: list[Turn], role: str = "agent") -> Trace:
    return Trace(role, tuple(messages), (1, 2), (0, 1), (0.0, -1.0), (), tuple(turns), "completed", "done", True)


def test_json_tells_the_whole_tree_and_media_by_hash() -> None:
    picture = Image(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    clip = Clip(np.zeros((3, 2, 2, 3), np.uint8), 2.0)
    child = trace([user("part", clip), assistant("inner")], [], "subagent")
    call = ToolCall("functions.look:0", "look", '{"at": 1}')
    said = assistant("now", reasoning="hm", tool_calls=(call,))
    result = tool_result(call.id, "here", picture)
    turn = Turn(5, (7,), (-0.5,), 2, said, (result,), (child,), 0.0, 0.25, 0.5)
    root = trace([user("look"), said, result], [turn])

    told = json.loads(json.dumps(root.with_signals(parallel=0.5).to_json()))
    assert told["signals"] == {"parallel": 0.5}
    assert [message["content"][0]["text"] for message in told["prompt"]] == ["look"]
    [first] = told["turns"]
    assert (first["reasoning"], first["text"]) == ("hm", "now")
    assert first["calls"] == [{"id": "functions.look:0", "name": "look", "arguments": '{"at": 1}'}]
    assert (first["started"], first["generated"], first["ended"]) == (0.0, 0.25, 0.5)
    named = first["results"][0]["content"][1]
    assert (named["type"], named["shape"]) == ("image", [4, 4, 3])
    assert first["children"][0]["role"] == "subagent"

    media = media_by_hash(root)
    assert media[named["hash"]] is picture
    assert media[first["children"][0]["prompt"][0]["content"][1]["hash"]] is clip
    assert len(media) == 2


def test_media_hash_sees_pixels_shape_kind_and_rate() -> None:
    flat = np.zeros((2, 3, 3), np.uint8)
    other = flat.copy()
    other[0, 0, 0] = 1
    parts = [
        Image(flat),
        Image(other),
        Image(np.zeros((3, 2, 3), np.uint8)),
        Clip(np.zeros((1, 2, 3, 3), np.uint8), 1.0),
        Clip(np.zeros((1, 2, 3, 3), np.uint8), 2.0),
    ]
    assert len({media_hash(part) for part in parts}) == 5
    assert media_hash(Image(flat)) == media_hash(Image(flat.copy()))
    # A view with strides names the same picture as its copy.
    wide = np.arange(36, dtype=np.uint8).reshape(2, 6, 3)
    assert media_hash(Image(wide[:, ::2])) == media_hash(Image(wide[:, ::2].copy()))
