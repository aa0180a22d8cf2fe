"""Pages of cached tokens: who holds them, and which prefixes they spell. Plain bookkeeping, no tensors.

A page is free, or the tail of one sequence that still writes to it, or full and then a node of the prefix tree, where
any number of sequences may hold it. Full pages are never written again, so nothing is ever copied. A node that nobody
holds stays as a cached prefix until its page is needed; the one let go longest ago is given up first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

Key = int | tuple[bytes, int]
"""What a cached token is: its id, or which media item it shows (by content) and which of the item's tokens it is."""


@dataclass(eq=False)
class Prefix:
    """One full page behind those of its parent. holders: sequences that go on from here or from below."""

    parent: "Prefix | None"
    content: tuple[Key, ...]
    page: int
    holders: int = 0
    children: dict[tuple[Key, ...], "Prefix"] = field(default_factory=dict[tuple[Key, ...], "Prefix"])


class PagePool:
    """At most `capacity` pages of `page` tokens. `made` is how many have ever been in use: page numbers below it."""

    def __init__(self, capacity: int, page: int):
        self.capacity = capacity
        self.page = page
        self.made = 0
        self.root = Prefix(None, (), -1)
        self._free: list[int] = []
        # Longest let go first. A sequence lets go of its last page first, so children always stand before parents.
        self._idle: dict[Prefix, None] = {}

    @property
    def available(self) -> int:
        return self.capacity - self.made + len(self._free) + len(self._idle)

    def take(self) -> int | None:
        """A page to write to; None where every page is in use."""
        if self._free:
            return self._free.pop()
        if self.made < self.capacity:
            self.made += 1
            return self.made - 1
        if not self._idle:
            return None
        oldest = next(iter(self._idle))
        del self._idle[oldest]
        assert oldest.parent is not None
        del oldest.parent.children[oldest.content]
        return oldest.page

    def give_back(self, page: int) -> None:
        """A page that was never published."""
        self._free.append(page)

    def find(self, parent: Prefix, content: Sequence[Key]) -> Prefix | None:
        """The page that goes on from `parent` with exactly this content, then held by the caller."""
        node = parent.children.get(tuple(content))
        if node is not None:
            self._hold(node)
        return node

    def publish(self, parent: Prefix, content: Sequence[Key], page: int) -> Prefix:
        """Make a filled page part of the tree, held by the caller. Where another sequence was first with the same
        content, its page takes the place of this one."""
        node = self.find(parent, content)
        if node is not None:
            self.give_back(page)
            return node
        node = Prefix(parent, tuple(content), page, holders=1)
        parent.children[node.content] = node
        return node

    def let_go(self, path: Sequence[Prefix]) -> None:
        """A sequence's pages, first to last."""
        for node in reversed(path):
            assert node.holders > 0
            node.holders -= 1
            if node.holders == 0:
                self._idle[node] = None

    def forget(self) -> None:
        """Give up every cached prefix; nothing may be held."""
        self._free += [node.page for node in self._idle]
        self._idle.clear()
        self.root.children.clear()
        assert len(self._free) == self.made

    def _hold(self, node: Prefix) -> None:
        node.holders += 1
        self._idle.pop(node, None)
