"""A server of the official package, as a process of its own."""

import asyncio
import io
import os

from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError
from PIL import Image as PillowImage

server = MCPServer("test")


@server.tool()
async def add(title: int, times: int = 1) -> str:
    """Add one."""
    return f"{title + times} in {os.getpid()}"


@server.tool()
async def draw() -> Image:
    """Draw."""
    buffer = io.BytesIO()
    PillowImage.new("RGB", (3, 2), (1, 2, 3)).save(buffer, "PNG")
    return Image(data=buffer.getvalue(), format="png")


@server.tool()
async def fail() -> str:
    """Fail."""
    raise ToolError("no luck")


@server.tool()
async def hang() -> str:
    """Hang."""
    await asyncio.sleep(1e9)
    return ""


server.run("stdio")
