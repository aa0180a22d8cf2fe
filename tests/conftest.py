"""Settings of every test: one thread (the same sums in the same order everywhere), no window, no deadlines."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from hypothesis import settings

from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer

# No deadline: a busy machine is no failure. Derandomized: the same commit passes or fails everywhere alike.
settings.register_profile("baltoro", deadline=None, derandomize=True, database=None)
settings.load_profile("baltoro")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["the capital of Zorblax is Mirn, search the page and open it to answer", '{"query": "the capital"}'] * 4
    return Tokenizer.train(texts, 384)


@pytest.fixture(scope="session")
def media_spec() -> MediaSpec:
    half = (0.5, 0.5, 0.5)
    return MediaSpec(patch_size=4, merge=2, patch_limit=64, side_limit=16, mean=half, std=half, frames_per_chunk=4)
