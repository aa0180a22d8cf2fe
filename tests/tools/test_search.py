"""Search against hand-picked pages and against hostile queries."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.agent.tool import CallContext
from baltoro.chat.messages import Part
from baltoro.tools.search import Hit, Search, SearchIndex
from baltoro.world.document import Document

PAGES = [
    Document("u/1", "Mirn", ("Mirn is a town near Zorblax. The river Ilm runs through it.",)),
    Document("u/2", "Zorblax", ("Zorblax has a harbour.", "It trades with Mirn.")),
    Document("u/3", "Rivers", ("The Ilm, the Osk and the Tave.",)),
    Document("u/4", "Ørsted über Ñandú", ("NOT OR AND NEAR",)),
]
CONTEXT = CallContext(None, 0, 0.0)


@pytest.fixture(scope="module")
def index() -> Iterator[SearchIndex]:
    index = SearchIndex.build(PAGES)
    yield index
    index.close()


@pytest.mark.parametrize(
    ("query", "first", "others"),
    [
        ("Zorblax", "u/2", {"u/1"}),  # the page about it before the page that mentions it
        ("what does mirn trade", "u/1", {"u/2"}),  # words that no page has do not matter, nor does case
        ("Osk", "u/3", set()),
        ("town harbour river", "u/1", {"u/2"}),  # two of the words before one; "rivers" is another word
        ("nandu", "u/4", set()),  # accents do not matter
    ],
)
def test_finds_and_ranks(index: SearchIndex, query: str, first: str, others: set[str]) -> None:
    urls = [hit.url for hit in index.search(query, 10)]
    assert urls[0] == first
    assert set(urls[1:]) == others


def test_the_page_about_a_thing_comes_before_pages_that_repeat_its_name() -> None:
    pages = [Document(f"u/{i}", f"town{i}", ("Zorblax, Zorblax and again Zorblax",)) for i in range(3)]
    others = [Document(f"v/{i}", f"river{i}", ("water and trade",)) for i in range(20)]
    about = Document("u/it", "Zorblax", ("a harbour, its trade",))
    index = SearchIndex.build([*pages, *others, about])
    assert index.search("Zorblax", 1) == [Hit("u/it", "Zorblax")]
    index.close()


def test_at_most_k(index: SearchIndex) -> None:
    assert len(index.search("the mirn zorblax ilm", 2)) == 2


def test_pages_of_equal_rank_come_in_their_order() -> None:
    index = SearchIndex.build([Document(f"u/{i}", "same", ("words",)) for i in range(9)])
    assert [hit.url for hit in index.search("same", 9)] == [f"u/{i}" for i in range(9)]
    index.close()


@pytest.mark.parametrize(
    "query",
    ['"', "'", "title:Mirn OR", "NEAR(Mirn Ilm, 1)", "*", "^", "-", "(", "Mirn)", 'a"b', "{title}:", "\0", "Mirn NOT"],
)
def test_query_syntax_is_text(index: SearchIndex, query: str) -> None:
    index.search(query, 3)


def test_operators_are_words(index: SearchIndex) -> None:
    # As syntax this would exclude the pages with "Ilm"; as words it finds them.
    assert {hit.url for hit in index.search("Mirn NOT Ilm", 10)} == {"u/1", "u/2", "u/3", "u/4"}
    assert index.search("title:harbour", 1)[0] == Hit("u/2", "Zorblax")
    assert index.search("harb*", 10) == []


@given(st.text())
def test_no_query_breaks_the_index(query: str) -> None:
    index = SearchIndex.build(PAGES)
    assert len(index.search(query, 3)) <= 3
    index.close()


@given(st.text(alphabet=st.characters(categories=["Ll", "Nd"], max_codepoint=0x17F), min_size=1))
def test_every_word_of_a_page_finds_it(word: str) -> None:
    index = SearchIndex.build([Document("u", "t", (f"before {word} after",))])
    assert index.search(word, 1) == [Hit("u", "t")]
    index.close()


async def test_what_the_model_sees(index: SearchIndex) -> None:
    async def seen(query: str) -> tuple[Part, ...]:
        return (await Search(index).call({"query": query}, CONTEXT)).shown

    assert await seen("Zorblax") == ("Zorblax u/2\nMirn u/1",)
    assert await seen("quux") == ("no results",)
    assert await seen("?!") == ("no results",)


def test_an_index_can_stand_in_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "pages.sqlite")
    SearchIndex.build(PAGES, path).close()
    again = SearchIndex(sqlite3.connect(path))
    assert again.search("Osk", 3) == [Hit("u/3", "Rivers")]
    again.close()
