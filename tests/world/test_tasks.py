"""Wide-search tasks: gold answers that the pages state, prompts that only say what is wanted."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.score.table import parse_table
from baltoro.world.entities import World
from baltoro.world.tasks import WideSearch, closed, label, row, wide_search

WORLDS = [World(seed, split) for seed in range(4) for split in ("train", "heldout")]
IMPLIED_WIDTH = re.compile(r"parallel|concurren|simultan|at once|split|together|same time|batch|all at|divide", re.I)


@given(
    world=st.sampled_from(WORLDS),
    seed=st.integers(0, 2**32),
    sizes=st.tuples(st.integers(1, 25), st.integers(0, 8)),
    columns=st.sampled_from([(1, 1), (2, 3), (3, 3)]),
)
def test_the_pages_state_the_gold_answer(
    world: World, seed: int, sizes: tuple[int, int], columns: tuple[int, int]
) -> None:
    low, high = sizes[0], sizes[0] + sizes[1]
    task = wide_search(random.Random(seed), world, low, high, columns)
    # A kind has 20 entities: more cannot be asked for.
    assert min(low, 20) <= len(task.names) <= min(high, 20)
    assert columns[0] <= len(task.columns) <= columns[1]
    assert len(set(task.names)) == len(task.names)
    assert len(set(task.columns)) == len(task.columns)
    assert tuple(task.gold) == task.names
    pages = {document.title: document.text.split("\n") for document in world.documents}
    for name, cells in task.gold.items():
        assert set(cells) == set(task.columns)
        assert all(f"|{column}={value}" in pages[name] for column, value in cells.items())


def test_every_size_and_every_kind_is_asked_for() -> None:
    tasks = [wide_search(random.Random(seed), WORLDS[0], 3, 5) for seed in range(200)]
    assert {len(task.names) for task in tasks} == {3, 4, 5}
    assert {len(task.columns) for task in tasks} == {2, 3}
    kinds = {
        tuple(sorted(kind.keys)) for task in tasks for kind in WORLDS[0].kinds if set(task.columns) <= set(kind.keys)
    }
    # Both kinds of packages have the same fields.
    assert len(kinds) == len({kind.keys for kind in WORLDS[0].kinds}) == 3


def test_the_prompt() -> None:
    gold = {"Bel Stanby": {"age": "20", "metal": "abnel"}, "Ok Rudton": {"age": "31", "metal": "tuvey"}}
    task = WideSearch(("Bel Stanby", "Ok Rudton"), ("metal", "age"), gold)
    assert task.prompt == "Find name|metal|age\n①Bel Stanby|2\n②Ok Rudton|1"


@pytest.mark.parametrize("seed", range(20))
def test_the_prompt_neither_answers_nor_says_how_to_go_about_it(seed: int) -> None:
    task = wide_search(random.Random(seed), WORLDS[seed % len(WORLDS)], 8, 16)
    first, *lines = task.prompt.split("\n")
    assert not IMPLIED_WIDTH.search(first)  # behind it are names, which may be any words
    names, left = zip(*(line[1:].split("|") for line in lines), strict=True)
    assert names == task.names
    assert "".join(line[0] for line in lines) == "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯"[: len(task.names)]
    assert [int(each) for each in left] == [*range(len(task.names), 0, -1)]
    assert first == f"Find name|{'|'.join(task.columns)}"


def test_a_table_is_closed_by_a_label_that_its_task_has_not() -> None:
    assert closed(["①Bel Stanby|age=20", "②Ok Rudton|age=31"]) == "①Bel Stanby|age=20\n②Ok Rudton|age=31\n③"
    assert closed([]) == "①"
    task = wide_search(random.Random(1), WORLDS[0], 8, 16)
    text = closed([row(i, name, task.gold[name], task.columns) for i, name in enumerate(task.names, 1)])
    assert text.split("\n")[-1] not in task.prompt
    assert parse_table(text, task.columns) == task.gold


def test_rows_without_a_label_are_refused() -> None:
    assert label(20) + label(21) + label(35) + label(36) + label(50) == "⑳㉑㉟㊱㊿"
    for number in (0, 51):
        with pytest.raises(ValueError, match=f"row {number}"):
            label(number)


def test_a_row() -> None:
    assert row(7, "Bel Stanby", {"age": "20", "metal": "abnel", "x": "?"}, ("metal", "age")) == (
        "⑦Bel Stanby|metal=abnel|age=20"
    )
