"""Tools of a real MCP server in a process of its own."""

import os
import sys
from pathlib import Path

import pytest

from baltoro.agent.tool import CallContext
from baltoro.chat.messages import Image
from baltoro.rollout.mcp import mcp_tools

COMMAND = (sys.executable, str(Path(__file__).with_name("mcp_server.py")))
CONTEXT = CallContext(None, 0, 0.0)


async def test_tools_of_a_server() -> None:
    async with mcp_tools(COMMAND, seconds=1.0) as listed:
        tools = {tool.spec.name: tool for tool in listed}
        assert tools["add"].spec.description == "Add one."
        assert tools["add"].spec.parameters["properties"] == {
            "title": {"type": "integer"},
            "times": {"type": "integer", "default": 1},
        }
        (said,) = (await tools["add"].call({"title": 4}, CONTEXT)).content
        text, process = str(said).split(" in ")
        assert text == "5"
        assert os.path.exists(f"/proc/{process}")
        (picture,) = (await tools["draw"].call({}, CONTEXT)).content
        assert isinstance(picture, Image)
        assert picture.pixels.tolist() == [[[1, 2, 3]] * 3] * 2
        assert "no luck" in (await tools["fail"].call({}, CONTEXT)).error
        assert (await tools["hang"].call({}, CONTEXT)).error == "hang took longer than 1 s and was given up"
        assert (await tools["add"].call({"title": 1}, CONTEXT)).content  # the connection outlives what was given up
    assert not os.path.exists(f"/proc/{process}")


async def test_an_error_within_the_block_ends_the_process() -> None:
    said: list[str] = []
    with pytest.raises(RuntimeError, match="mine"):
        async with mcp_tools(COMMAND) as listed:
            said += [str(part) for part in (await listed[0].call({"title": 4}, CONTEXT)).content]
            raise RuntimeError("mine")
    assert not os.path.exists(f"/proc/{said[0].split(' in ')[1]}")
