"""Item-F1 of a table (WideSearch): every cell is an item."""

from collections.abc import Mapping, Sequence

_LABELS = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳㉑㉒㉓㉔㉕㉖㉗㉘㉙㉚㉛㉜㉝㉞㉟㊱㊲㊳㊴㊵㊶㊷㊸㊹㊺㊻㊼㊽㊾㊿"


def parse_table(text: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Lines `name|column=value|...`, a label (circled number) before the name or not, cells in any order; columns that
    were not asked for are left out, and of two rows or cells with one name the first counts."""
    table: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        name, *cells = (cell.strip() for cell in line.lstrip(_LABELS).split("|"))
        if name and cells and name not in table:
            row = table[name] = {}
            for cell in cells:
                column, equals, value = cell.partition("=")
                if equals and column.strip() in columns:
                    row.setdefault(column.strip(), value.strip())
    return table


def item_f1(predicted: Mapping[str, Mapping[str, str]], gold: Mapping[str, Mapping[str, str]]) -> float:
    """F1 over cells (row, column, value); values match after case and white space are folded. Both empty: 1."""
    want = _items(gold)
    have = _items(predicted)
    if not want and not have:
        return 1.0
    return 2 * len(want & have) / (len(want) + len(have))


def _items(table: Mapping[str, Mapping[str, str]]) -> set[tuple[str, str, str]]:
    return {(_fold(r), c, _fold(v)) for r, cells in table.items() for c, v in cells.items() if v}


def _fold(text: str) -> str:
    return " ".join(text.lower().split())
