"""Tools of MCP servers, across processes. Needs the package mcp."""

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import numpy as np
from mcp import Client, MCPError, StdioServerParameters
from mcp.types import ImageContent, TextContent
from PIL import Image as PillowImage

from baltoro.agent.tool import CallContext, Tool, ToolResult
from baltoro.chat.messages import Image, Part, ToolSpec
from baltoro.rollout.toolset import untitled


@asynccontextmanager
async def mcp_tools(server: Sequence[str] | str, seconds: float = 60.0) -> AsyncGenerator[list[Tool]]:
    """The tools of a server, while the block runs. server: the command of a process that is started and ended with the
    block, or the URL of a running one. A call that takes longer than `seconds` is given up, and the model is told.

    Enter and leave it in one task, as `Env.rollout` does."""
    given = server if isinstance(server, str) else StdioServerParameters(command=server[0], args=list(server[1:]))
    try:
        async with Client(given) as client:
            listed = await client.list_tools()
            yield [
                _McpTool(client, ToolSpec(tool.name, tool.description or "", untitled(tool.input_schema)), seconds)
                for tool in listed.tools
            ]
    except ExceptionGroup as group:
        raise _only(group) from None


def _only(error: Exception) -> Exception:
    """The error itself, where the client's task groups wrapped a single one."""
    if not isinstance(error, ExceptionGroup):
        return error
    group = cast(ExceptionGroup[Exception], error)
    inner = list(group.exceptions)
    return _only(inner[0]) if len(inner) == 1 else group


class _McpTool:
    sequential = False

    def __init__(self, client: Client, spec: ToolSpec, seconds: float) -> None:
        self.spec = spec
        self._client = client
        self._seconds = seconds

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        try:
            async with asyncio.timeout(self._seconds):
                result = await self._client.call_tool(self.spec.name, arguments)
        except TimeoutError:
            return ToolResult(error=f"{self.spec.name} took longer than {self._seconds:g} s and was given up")
        except MCPError as error:
            return ToolResult(error=str(error))
        parts = tuple(_part(content) for content in result.content)
        if result.is_error:
            return ToolResult(error="".join(part for part in parts if isinstance(part, str)))
        return ToolResult(parts)


def _part(content: object) -> Part:
    match content:
        case TextContent(text=text):
            return text
        case ImageContent(data=data):
            with PillowImage.open(
                io.BytesIO(base64.b64decode(data)), formats=["PNG", "JPEG", "WEBP", "GIF"]
            ) as picture:
                return Image(np.asarray(picture.convert("RGB")))
        case _:
            return f"[{type(content).__name__}, which cannot be shown]"
