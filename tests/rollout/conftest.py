import pytest

from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["the capital of Zorblax is Mirn, search the page and open it to answer", '{"query": "the capital"}'] * 4
    return Tokenizer.train(texts, 384)


@pytest.fixture(scope="session")
def media_spec() -> MediaSpec:
    half = (0.5, 0.5, 0.5)
    return MediaSpec(patch_size=4, merge=2, patch_limit=64, side_limit=16, mean=half, std=half, frames_per_chunk=4)
