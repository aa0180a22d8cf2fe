"""What the small tokenizer is trained on: reproducible, and good for the names and formats of the world."""

import random
from collections.abc import Sequence

import pytest

from baltoro.chat.messages import Message, ToolCall, assistant, system, tool_result, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.world.corpora import Corpus, installed_packages
from baltoro.world.lexicon import lexicon
from baltoro.world.names import FIRST, LAST, WORDS, split_of

CORPUS = Corpus(("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 100,))
CALL = ToolCall("functions.search:0", "search", '{"query":"Bel Stanby"}')
DIALOGUE = (
    system("Tools: search, open."),
    user("Find age.\nBel Stanby"),
    assistant("So I look.", reasoning="I know nothing yet", tool_calls=(CALL,)),
    tool_result(CALL.id, "Bel Stanby 12"),
)


def texts(seed: int, dialogues: Sequence[Sequence[Message]] = (DIALOGUE,)) -> list[str]:
    return list(lexicon(dialogues, CORPUS, random.Random(seed)))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return texts(0)


def test_it_follows_from_its_generator(lines: list[str]) -> None:
    assert texts(0) == lines
    assert texts(1) != lines


def test_every_part_of_a_dialogue_is_in_it(lines: list[str]) -> None:
    everything = "\n".join(lines)
    for part in (
        "Tools: search, open.",
        "Find age.\nBel Stanby",
        "So I look.",
        "I know nothing yet",
        "functions.search:0",
        '{"query":"Bel Stanby"}',
        "## Return of functions.search:0\n",
        "Bel Stanby 12",
        "clocks were striking",
    ):
        assert part in everything, part


def test_words_of_the_world_are_worth_a_token(lines: list[str]) -> None:
    """In the places where they stand: first names begin a line, the others follow a space."""
    tokenizer = Tokenizer.train(lines, 2048)
    single = [len(tokenizer.encode(word)) == 1 for word in FIRST]
    single += [len(tokenizer.encode(" " + word)) == 1 for word in (*LAST, *WORDS)]
    assert sum(single) == len(single)
    assert all(len(tokenizer.encode(str(n))) == 1 for n in range(100))


def test_whole_names_of_held_out_people_and_packages_are_not_in_it(lines: list[str]) -> None:
    everything = "\n".join(lines)
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    assert not [name for name in people if split_of(name) == "heldout" and name in everything]
    assert not [r.name for r in installed_packages() if r.document.text in everything]
