import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.score.table import item_f1, parse_table
from baltoro.world.tasks import row

Table = dict[str, dict[str, str]]
GOLD = {"Ada": {"age": "36", "town": "London"}, "Bo": {"age": "20", "town": "Rome"}}
NAME = st.text("abcXYZ 0.-_é", min_size=1).filter(lambda text: text == text.strip() and text)
VALUE = st.text("abcXYZ 0.-_é:>=,", min_size=1).filter(lambda text: text == text.strip() and text)
COLUMNS = ("age", "town", "Requires-Python")
TABLES = st.dictionaries(NAME, st.fixed_dictionaries(dict.fromkeys(COLUMNS, VALUE)), max_size=5)
PARTIAL = st.dictionaries(NAME, st.dictionaries(st.sampled_from(COLUMNS), VALUE), max_size=5)


@pytest.mark.parametrize(
    ("predicted", "score"),
    [
        (GOLD, 1),
        # 4 gold items. Right / predicted = precision, right / 4 = recall.
        ({"Ada": {"age": "36", "town": "London"}}, 2 * 2 / (2 + 4)),  # a row is missing
        ({**GOLD, "Cy": {"age": "1", "town": "Bonn"}}, 2 * 4 / (6 + 4)),  # a row too many
        ({**GOLD, "Bo": {"age": "20", "town": "Paris"}}, 2 * 3 / (4 + 4)),  # a wrong cell
        ({**GOLD, "Bo": {"age": "20"}}, 2 * 3 / (3 + 4)),  # a missing cell
        ({**GOLD, "Bo": {"age": "20", "town": ""}}, 2 * 3 / (3 + 4)),  # an empty cell is a missing one
        ({"Ada": GOLD["Bo"], "Bo": GOLD["Ada"]}, 0),  # every value in the other row
        ({"Ada": {"age": "London", "town": "36"}}, 0),  # every value in the other column
        ({}, 0),
        ({"aDA": {"age": " 36", "town": "LONDON"}, " Bo ": {"age": "20", "town": "rome\n"}}, 1),  # case and space
        # A second spelling of a row with other values costs precision: guessing twice does not pay.
        ({**GOLD, "ADA": {"age": "37", "town": "Paris"}}, 2 * 4 / (6 + 4)),
        ({**GOLD, "ADA": {"age": "36", "town": "london"}}, 1),  # and the same row again is the same items
    ],
)
def test_item_f1_by_hand(predicted: Table, score: float) -> None:
    assert item_f1(predicted, GOLD) == pytest.approx(score)


def test_inner_space_is_folded_and_kept_apart_from_none() -> None:
    gold = {"A  B": {"c": "x y"}}
    assert item_f1({"a b": {"c": "X \t Y"}}, gold) == 1
    assert item_f1({"ab": {"c": "x y"}}, gold) == 0
    assert item_f1({"a b": {"c": "xy"}}, gold) == 0


def test_empty_tables() -> None:
    assert item_f1({}, {}) == 1
    assert item_f1({"a": {}}, {}) == 1
    assert item_f1({"a": {"c": "x"}}, {}) == 0
    assert item_f1({}, {"a": {"c": "x"}}) == 0


@given(PARTIAL, PARTIAL)
def test_bounds_and_symmetry(a: Table, b: Table) -> None:
    assert item_f1(a, a) == 1
    assert 0 <= item_f1(a, b) <= 1
    assert item_f1(a, b) == item_f1(b, a)


@given(TABLES.filter(bool), st.data())
def test_one_wrong_cell_costs_one_item(gold: Table, data: st.DataObject) -> None:
    # Names that fold to one another would make two items one.
    items = {(name.lower().split().__repr__(), column) for name, cells in gold.items() for column in cells}
    n = sum(map(len, gold.values()))
    if len(items) < n:
        return
    name, column = data.draw(st.sampled_from([(name, c) for name, cells in gold.items() for c in cells]))
    wrong = {**gold, name: {**gold[name], column: "wrong#"}}
    assert item_f1(wrong, gold) == pytest.approx((n - 1) / n)


@given(TABLES)
def test_what_row_writes_parse_table_reads(table: Table) -> None:
    text = "\n".join(row(number, name, cells, COLUMNS) for number, (name, cells) in enumerate(table.items(), 1))
    assert parse_table(text, COLUMNS) == table


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("Ada|age=36|town=London", {"Ada": GOLD["Ada"]}),
        ("Ada|town=London|age=36", {"Ada": GOLD["Ada"]}),
        ("  Ada | age = 36 | town =London  ", {"Ada": GOLD["Ada"]}),
        ("Ada|age=36|town=London\nAda|age=99|town=Rome", {"Ada": GOLD["Ada"]}),
        ("Ada|age=36|age=99|town=London", {"Ada": GOLD["Ada"]}),
        ("Ada|age=36|shoe=40|town=London", {"Ada": GOLD["Ada"]}),
        ("Here it is:\n\nAda|age=36|town=London\nnot found", {"Ada": GOLD["Ada"]}),
        ("Ada|town=>=London=City", {"Ada": {"town": ">=London=City"}}),
        ("1\nAda|age=36|town=London\n2\nBo|age=20|town=Rome", GOLD),
        ("Ada|age 36|town", {"Ada": {}}),
        ("|age=36|town=London", {}),
        ("", {}),
    ],
)
def test_parse_table_by_hand(text: str, table: Table) -> None:
    assert parse_table(text, ("age", "town")) == table


@given(st.text())
def test_any_text_is_a_table(text: str) -> None:
    table = parse_table(text, ("age",))
    assert 0 <= item_f1(table, GOLD) <= 1
