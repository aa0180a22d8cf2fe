"""Offline search: SQLite FTS5 with BM25 over documents."""

import re
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baltoro.agent.tool import CallContext, ToolResult
from baltoro.chat.messages import ToolSpec
from baltoro.world.document import Document

# A word in the title says more than one in the body: a page about X outranks the pages that mention X.
_TITLE_WEIGHT = 10.0


@dataclass(frozen=True)
class Hit:
    url: str
    title: str


class SearchIndex:
    """Full-text index over titles and texts. One thread uses it; a query takes well under a millisecond."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    def build(cls, documents: Iterable[Document], path: str = ":memory:") -> "SearchIndex":
        """`path`: a file that does not exist yet, or memory."""
        connection = sqlite3.connect(path)
        connection.execute("CREATE VIRTUAL TABLE pages USING fts5(title, body, url UNINDEXED)")
        connection.executemany(
            "INSERT INTO pages (title, body, url) VALUES (?, ?, ?)", ((d.title, d.text, d.url) for d in documents)
        )
        connection.commit()
        return cls(connection)

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best pages that have any word of the query, first the one whose title it is; pages of equal rank in the
        order they were added."""
        # Every word becomes a quoted string, so that no text of the model is read as FTS5 syntax.
        words = re.findall(r"\w+", query)
        if not words:
            return []
        rows = self._connection.execute(
            "SELECT url, title FROM pages WHERE pages MATCH ? "
            "ORDER BY title = ? COLLATE NOCASE DESC, bm25(pages, ?, 1.0), rowid LIMIT ?",
            (" OR ".join(f'"{word}"' for word in words), query.strip(), _TITLE_WEIGHT, k),
        )
        return [Hit(url, title) for url, title in rows]

    def close(self) -> None:
        self._connection.close()


class Search:
    """search(query): one line per hit."""

    spec = ToolSpec(
        "search",
        "Search the pages for words.",
        {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    )
    sequential = False

    def __init__(self, index: SearchIndex, k: int = 3) -> None:
        self._index = index
        self._k = k

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        hits = self._index.search(str(arguments["query"]), self._k)
        return ToolResult((hit_lines(hits),))


def hit_lines(hits: Sequence[Hit]) -> str:
    """What the model sees of a search: title and url, once where they are the same."""
    return "\n".join(hit.url if hit.url == hit.title else f"{hit.title} {hit.url}" for hit in hits) or "no results"
