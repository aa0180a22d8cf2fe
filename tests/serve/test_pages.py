"""The page allocator against a plain account of who wrote what where."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baltoro.serve.pages import PagePool, Prefix

PAGE, CAPACITY = 2, 4
Content = tuple[int, int]


class Sequence:
    def __init__(self) -> None:
        self.told: list[Content] = []  # what its pages hold
        self.path: list[Prefix] = []
        self.tail: list[int] = []


class Pool(RuleBasedStateMachine):
    """Sequences grow by adopting cached pages or by writing new ones, publish them at once or later, and let go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(CAPACITY, PAGE)
        self.sequences = [Sequence(), Sequence(), Sequence()]
        self.written: dict[int, tuple[Content, ...]] = {}  # page -> everything up to and with its content

    @rule(which=st.integers(0, 2), content=st.sampled_from([(0, 0), (0, 1)]), publish=st.booleans())
    def grow(self, which: int, content: Content, publish: bool) -> None:
        sequence = self.sequences[which]
        parent = sequence.path[-1] if sequence.path else self.pool.root
        node = None if sequence.tail else self.pool.find(parent, content)
        if node is not None:
            assert self.written[node.page] == (*sequence.told, content)
            sequence.path.append(node)
        else:
            before = self._held()
            page = self.pool.take()
            if page is None:
                assert len(before) == CAPACITY
                return
            assert page not in before
            self.written[page] = (*sequence.told, content)
            sequence.tail.append(page)
        sequence.told.append(content)
        while publish and sequence.tail:
            parent = sequence.path[-1] if sequence.path else self.pool.root
            told = sequence.told[len(sequence.path)]
            sequence.path.append(self.pool.publish(parent, told, sequence.tail.pop(0)))

    @rule(which=st.integers(0, 2))
    def end(self, which: int) -> None:
        sequence = self.sequences[which]
        self.sequences[which] = Sequence()
        for page in sequence.tail:
            self.pool.give_back(page)
        self.pool.let_go(sequence.path)

    @precondition(lambda self: not self._held())
    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert not self._nodes()

    def _nodes(self) -> list[Prefix]:
        nodes = [self.pool.root]
        for node in nodes:
            nodes += node.children.values()
        return nodes[1:]

    def _held(self) -> set[int]:
        return {page for s in self.sequences for page in [*s.tail, *(node.page for node in s.path)]}

    @invariant()
    def every_page_has_one_place(self) -> None:
        tails = [page for s in self.sequences for page in s.tail]
        cached = [node.page for node in self._nodes()]
        assert len(set(tails + cached)) == len(tails + cached)
        assert len(tails + cached) + len(self.pool._free) == self.pool.made <= CAPACITY  # none is lost
        assert self.pool.available == CAPACITY - len(self._held())

    @invariant()
    def holders_are_counted(self) -> None:
        for node in self._nodes():
            assert node.holders == sum(node in s.path for s in self.sequences)

    @invariant()
    def a_sequence_finds_what_it_was_told(self) -> None:
        for sequence in self.sequences:
            pages = [*(node.page for node in sequence.path), *sequence.tail]
            assert [self.written[page] for page in pages] == [
                tuple(sequence.told[: i + 1]) for i in range(len(sequence.told))
            ]


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase
