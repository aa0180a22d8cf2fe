"""Real text: Python's own, a folder's, and the metadata of the installed packages, which is held out."""

import importlib.metadata
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.score.table import parse_table
from baltoro.world.corpora import FIELDS, Corpus, PackageRecord, folder_corpus, installed_packages, python_corpus, words
from baltoro.world.entities import World
from baltoro.world.tasks import row


@pytest.fixture(scope="module")
def records() -> list[PackageRecord]:
    return installed_packages()


def read_independently(name: str) -> dict[str, set[str]]:
    """Per field the first line of every header line that may stand for it."""
    metadata = importlib.metadata.metadata(name)
    licences = metadata.get_all("License-Expression") or metadata.get_all("License") or []
    return {
        "Version": {importlib.metadata.version(name)},
        "License": {licence.splitlines()[0].strip() for licence in licences},
        "Requires-Python": set(metadata.get_all("Requires-Python") or []),
    }


def test_gold_values_are_those_of_importlib_metadata(records: list[PackageRecord]) -> None:
    assert len(records) >= 30
    for record in records:
        expected = read_independently(record.name)
        assert record.values.keys() == expected.keys() == set(FIELDS)
        assert all(record.values[field] in expected[field] for field in FIELDS), record


def test_none_that_is_complete_is_missing(records: list[PackageRecord]) -> None:
    found = {record.name for record in records}
    for name in ("numpy", "hypothesis", "pytest", "pillow"):
        fields = read_independently(name)
        assert name in found or not all(v and max(map(len, v)) <= 40 for v in fields.values()), name


def test_a_page_states_every_field_in_a_line_of_its_own(records: list[PackageRecord]) -> None:
    for record in records:
        lines = record.document.text.split("\n")
        assert lines[0] == record.name == record.document.title
        for field in FIELDS:
            assert [line for line in lines if line.startswith(f"|{field}=")] == [f"|{field}={record.values[field]}"]
        assert max(map(len, lines)) < 100


def test_records_have_urls_of_their_own_and_stand_in_order(records: list[PackageRecord]) -> None:
    assert len({record.document.url for record in records}) == len(records)
    lowered = [record.name.lower() for record in records]
    assert lowered == sorted(set(lowered))


def test_gold_values_can_be_answered_as_rows(records: list[PackageRecord]) -> None:
    answer = "\n".join(row(1, record.name, record.values, FIELDS) for record in records)
    assert parse_table(answer, FIELDS) == {record.name: record.values for record in records}


def write_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    header = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\nRequires-Python: >=3\n"
    (info / "METADATA").write_text(header + "\nDescription\n\nVersion: 999\n")


def test_of_two_installed_versions_the_importable_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Python itself, the first on the path hides the others; every page keeps a url of its own."""
    write_distribution(tmp_path / "first", "aatwice", "1.0")
    write_distribution(tmp_path / "second", "aatwice", "2.0")
    for i in range(5):
        write_distribution(tmp_path / "second", f"other{i}", "3.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    records = {record.name: record for record in installed_packages()}
    assert importlib.metadata.version("aatwice") == "1.0"
    assert records["aatwice"].values["Version"] == "1.0"
    assert len({record.document.url for record in records.values()}) == len(records)


def test_incomplete_metadata_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, lines in {
        "aanolicense": "Requires-Python: >=3",
        "aanopython": "License: MIT",
        "aalonglicense": f"License: {'x' * 41}\nRequires-Python: >=3",
        "aaexpression": "License: see LICENSE\nLicense-Expression: MIT\nRequires-Python: >=3",
        "aawhole": "License: MIT License\n        Copyright somebody\nRequires-Python: >=3",
    }.items():
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{lines}\n\nText")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert {r.name: r.values["License"] for r in installed_packages()} == {
        "aaexpression": "MIT",
        "aawhole": "MIT License",
    }


def test_no_record_of_an_installed_package_is_in_a_training_world(records: list[PackageRecord]) -> None:
    facts = {(r.name.lower(), field, r.values[field]) for r in records for field in ("Version", "Requires-Python")}
    pages = {r.document.text for r in records}
    for seed in range(60):
        world = World(seed, "train")
        assert not pages & {document.text for document in world.documents}
        invented = {
            (e.name.lower(), key, v) for kind in world.kinds for e in kind.entities for key, v in e.attributes.items()
        }
        assert not facts & invented


def test_the_python_corpus_has_no_metadata_of_packages(records: list[PackageRecord]) -> None:
    text = "\n".join(python_corpus().pieces)
    assert len(text) > 3_000_000
    for record in records:
        assert f"Name: {record.name}\n" not in text
        assert record.document.text not in text


def test_python_corpus_has_english_and_code() -> None:
    english, code = python_corpus().pieces
    assert 'The "try" statement' in english
    assert "class TestCase" not in code  # unittest is a package: only top-level modules are read
    assert "def urlsafe_b64encode(s):" in code  # base64.py


@given(seed=st.integers(0, 2**32), characters=st.integers(1, 3000))
def test_a_passage_stands_in_a_piece_and_begins_with_a_line(seed: int, characters: int) -> None:
    corpus = Corpus(("alpha beta\ngamma\n" * 200, "one two three\n" * 3))
    passage = corpus.passage(random.Random(seed), characters)
    assert len(passage) <= characters
    assert any(passage in piece for piece in corpus.pieces)
    if passage.count("\n") > 1:
        assert passage.split("\n")[0] in ("alpha beta", "gamma", "one two three", "")
    assert passage == corpus.passage(random.Random(seed), characters)


def test_pieces_are_drawn_from_equally_often() -> None:
    corpus = Corpus(("a" * 10_000, "b" * 10))
    drawn = [corpus.passage(random.Random(seed), 5)[0] for seed in range(2000)]
    assert abs(drawn.count("a") - 1000) < 112  # 5 standard deviations


def test_words() -> None:
    assert words() == tuple(sorted(set(words())))
    assert all(re.fullmatch("[a-z]{3,9}", word) for word in words())
    assert {"import", "return", "class", "socket", "parser"} <= set(words())
    assert len(words()) > 3000


def test_words_are_the_same_in_another_process() -> None:
    code = "from baltoro.world.corpora import words; print(*words())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(run.stdout.split()) == words()


def test_folder_corpus(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.md").write_text("second " * 1000)
    (tmp_path / "a.txt").write_text("first " * 1000)
    (tmp_path / "deep" / "c.rst").write_text("third " * 1000)
    (tmp_path / "x.bin").write_bytes(b"\x00" * 20_000)
    assert folder_corpus(tmp_path).pieces == ("first " * 1000 + "\n" + "second " * 1000 + "\n" + "third " * 1000,)


def test_a_folder_without_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        folder_corpus(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("x" * 9_999)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        folder_corpus(tmp_path)


def test_a_folder_named_like_a_text_is_entered(tmp_path: Path) -> None:
    (tmp_path / "notes.md").mkdir()
    (tmp_path / "notes.md" / "a.txt").write_text("x" * 10_000)
    assert folder_corpus(tmp_path).pieces == ("x" * 10_000,)
