"""Worlds: disjoint splits, pages that state every fact, the same bytes in every process."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import pytest

from baltoro.world.entities import PACKAGE_FIELDS, World
from baltoro.world.names import COLOURS

SEEDS = range(40)
DIGEST = """
import hashlib
from baltoro.world.entities import World
text = repr([(d.url, d.title, d.body) for s in ("train", "heldout") for d in World(7, s).documents])
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def worlds() -> dict[str, list[World]]:
    return {"train": [World(seed, "train") for seed in SEEDS], "heldout": [World(seed, "heldout") for seed in SEEDS]}


def names(worlds: list[World], people: bool) -> set[str]:
    """People's names have a space, packages' names have none."""
    found = {entity.name for world in worlds for kind in world.kinds for entity in kind.entities}
    return {name for name in found if (" " in name) == people}


@pytest.mark.parametrize("people", [True, False])
def test_train_and_held_out_worlds_share_no_name(worlds: dict[str, list[World]], people: bool) -> None:
    train, heldout = names(worlds["train"], people), names(worlds["heldout"], people)
    assert min(len(train), len(heldout)) > 500
    assert not train & heldout


def test_held_out_names_stand_on_no_training_page(worlds: dict[str, list[World]]) -> None:
    titles = {document.title for world in worlds["train"] for document in world.documents}
    lines = {line for world in worlds["train"] for document in world.documents for line in document.text.split("\n")}
    heldout = names(worlds["heldout"], True) | names(worlds["heldout"], False)
    assert not heldout & (titles | lines)


def test_every_entity_has_one_page_with_its_facts(worlds: dict[str, list[World]]) -> None:
    for world in [*worlds["train"], *worlds["heldout"]]:
        entities = [entity for kind in world.kinds for entity in kind.entities]
        assert all(document.url == document.title for document in world.documents)
        pages = {document.title: document.text.split("\n") for document in world.documents}
        assert len(pages) == len(entities) == 80
        for kind in world.kinds:
            for entity in kind.entities:
                title, *facts = pages[entity.name]
                assert title == entity.name
                stated = [fact.removeprefix("|").partition("=") for fact in facts]
                assert all(fact.startswith("|") for fact in facts)
                assert {key: value for key, _, value in stated} == entity.attributes
                assert len(stated) == len(entity.attributes)
                assert set(kind.keys) <= entity.attributes.keys()
                assert all(entity.attributes[key].strip() for key in kind.keys)


def test_kinds(worlds: dict[str, list[World]]) -> None:
    for split, people in (("train", 2), ("heldout", 3)):
        for world in worlds[split]:
            assert [len(kind.keys) for kind in world.kinds[:people]] == [5] * people
            assert [kind.keys for kind in world.kinds[people:]] == [PACKAGE_FIELDS] * (4 - people)
            assert [len(kind.entities) for kind in world.kinds] == [20] * 4


def test_values_are_of_their_kind(worlds: dict[str, list[World]]) -> None:
    entities = [e for world in worlds["train"] for kind in world.kinds for e in kind.entities]
    of = {key: [e.attributes[key] for e in entities if key in e.attributes] for key in ("age", "code", "colour")}
    assert all(value.isdecimal() and len(value) == 2 for value in of["age"] + of["code"])
    assert set(of["colour"]) == set(COLOURS)


def test_facts_cannot_be_learned_by_heart(worlds: dict[str, list[World]]) -> None:
    """A name that returns in another world comes with other facts, and pages state facts in varying order."""
    seen: dict[str, list[dict[str, str]]] = {}
    for world in worlds["train"]:
        for kind in world.kinds[:2]:
            for entity in kind.entities:
                seen.setdefault(entity.name, []).append(entity.attributes)
    shared = [(a[key], b[key]) for facts in seen.values() for a, b in pairwise(facts) for key in a if key in b]
    assert len(shared) > 100
    assert sum(a == b for a, b in shared) < 0.1 * len(shared)
    orders = {tuple(entity.attributes) for entity in worlds["train"][0].kinds[0].entities}
    assert len(orders) > 10


def test_sizes_are_as_asked() -> None:
    world = World(1, "train", per_kind=5)
    assert [len(kind.entities) for kind in world.kinds] == [5, 5, 5, 5]
    assert len(world.documents) == 20


def test_a_world_is_a_pure_function_of_its_seed_across_processes(worlds: dict[str, list[World]]) -> None:
    text = repr([(d.url, d.title, d.body) for split in ("train", "heldout") for d in worlds[split][7].documents])
    here = hashlib.sha256(text.encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    run = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here
    assert len({world.documents[0].text for world in worlds["train"]}) == len(SEEDS)
