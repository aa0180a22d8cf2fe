"""Reads a page of the world."""

from collections.abc import Mapping

from baltoro.agent.tool import CallContext, ToolResult
from baltoro.chat.messages import Clip, Part, ToolSpec
from baltoro.world.document import Document


class Reader:
    """open(url): the page's text and images. A clip is only announced; `view` shows a part of it."""

    spec = ToolSpec(
        "open",
        "Open a page.",
        {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]},
    )
    sequential = False

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self._documents = documents

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        document = self._documents.get(str(arguments["url"]))
        if document is None:
            return ToolResult(error=f"there is no page {arguments['url']}")
        return ToolResult(tuple(_readable(part) for part in document.body))


def _readable(part: Part) -> Part:
    return f"[clip of {len(part.frames) / part.fps:g} s]" if isinstance(part, Clip) else part
