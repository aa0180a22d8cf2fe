import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baltoro.chat.messages import TokenSequence
from baltoro.data.mixture import Mixture, Source


def _source(letter: int, longest: int) -> Source:
    return lambda rng: TokenSequence([letter] * rng.randint(1, longest), [], [])


@given(
    weights=st.lists(st.floats(0.1, 1), min_size=1, max_size=4),
    longest=st.lists(st.integers(1, 60), min_size=4, max_size=4),
    tokens=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=20, deadline=None)
def test_shares_of_tokens_hold_over_steps_however_small_a_batch(
    weights: list[float], longest: list[int], tokens: int, seed: int
) -> None:
    names = [str(i) for i in range(len(weights))]
    shares = {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}
    sources = {name: _source(i, longest[i]) for i, name in enumerate(names)}
    mixture = Mixture(lambda rng: sources, shares, tokens, seed)
    taken = Counter[int]()
    for step in range(max(20, 60_000 // tokens)):
        lengths = Counter[int]()
        for sequence in mixture.batch(step):
            lengths[sequence.ids[0]] += len(sequence.ids)
        assert tokens <= lengths.total() < tokens + max(longest)
        taken += lengths
    # Lengths are known from 32 examples to within some 10 %, and the last example of a batch is more often a long one.
    for i, name in enumerate(names):
        assert taken[i] / taken.total() == pytest.approx(shares[name], abs=0.12), name


_PROGRAM = """
import hashlib, random
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.data.mixture import Mixture
from baltoro.data.sources import Sources
from baltoro.world.corpora import python_corpus
from baltoro.world.entities import World

tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
spec = MediaSpec(8, 2, 256, 64, (0.5,) * 3, (0.5,) * 3, frames_per_chunk=4, sample_fps=4.0)
sources = Sources(tokenizer, spec, python_corpus(), 100)

def at(rng):
    world = World(rng.randrange(2**31), "train")
    return {
        "text": sources.text,
        "restated": lambda r: sources.restated(r, world),
        "caption": sources.caption,
        "question": sources.question,
    }

mixture = Mixture(at, {"text": 0.2, "restated": 0.2, "caption": 0.3, "question": 0.3}, 2000, SEED)
for step in STEPS:
    digest = hashlib.sha256()
    for sequence in mixture.batch(step):
        digest.update(repr((sequence.ids, sequence.loss_mask)).encode())
        for item in sequence.media:
            digest.update(repr(item.grid_thw).encode() + item.patches.tobytes())
    print(step, digest.hexdigest())
"""


def _digests(seed: int, steps: list[int], hash_seed: str) -> dict[str, str]:
    program = _PROGRAM.replace("SEED", str(seed)).replace("STEPS", str(steps))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_a_batch_is_a_function_of_seed_and_step_in_every_process() -> None:
    ordered = _digests(1, [0, 1, 2, 3], "1")
    # Another process, another hash seed, another order of the steps.
    assert _digests(1, [3, 1], "2") == {step: ordered[step] for step in ("3", "1")}
    assert len(set(ordered.values())) == 4
    assert _digests(2, [1], "1")["1"] != ordered["1"]
