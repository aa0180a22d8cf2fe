"""Names: the split is a property of the name, the same on every machine."""

import random

from hypothesis import given
from hypothesis import strategies as st

from baltoro.world.names import Split, draw, package_name, person_name, split_of

WORDS = ("socket", "parser", "thread", "queue")


def crc32(data: bytes) -> int:
    """The standard's definition, bit by bit (reflected polynomial EDB88320)."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_the_reference_is_crc32() -> None:
    assert crc32(b"123456789") == 0xCBF43926


@given(st.text())
def test_a_name_is_held_out_when_its_crc_is_0_modulo_10(name: str) -> None:
    assert split_of(name) == ("heldout" if crc32(name.encode()) % 10 == 0 else "train")


def test_a_tenth_is_held_out() -> None:
    rng = random.Random(0)
    names = [f"{rng.random()}" for _ in range(20_000)]
    share = sum(split_of(name) == "heldout" for name in names) / len(names)
    assert abs(share - 0.1) < 0.01  # 4.7 standard deviations


def test_draw_passes_over_names_of_the_other_split() -> None:
    # CRC-32 of a..z modulo 10, by the reference above: only those of held are 0.
    letters = "abcdefghijklmnopqrstuvwxyz"
    held = [letter for letter in letters if crc32(letter.encode()) % 10 == 0]
    others = [letter for letter in letters if letter not in held]
    assert held
    everything = iter(letters)
    assert draw(lambda: next(everything), "heldout") == held[0]
    everything = iter([*held, *others])
    assert draw(lambda: next(everything), "train") == others[0]


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "heldout"]))
def test_names_are_drawn_from_their_split(seed: int, split: Split) -> None:
    rng = random.Random(seed)
    person, package = person_name(rng, split), package_name(rng, split, WORDS)
    assert split_of(person) == split_of(package) == split
    first, last = person.split(" ")
    assert first.isalpha()
    assert last.isalpha()
    assert any(word in package.lower() for word in WORDS)
    assert person == person_name(random.Random(seed), split)
