import random
import re
from collections import Counter

import pytest

from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.data.sources import Sources
from baltoro.world.corpora import python_corpus

KINDS = {
    "digit": "digit ",
    "ocr": "text ",
    "chart": "bars ",
    "motion": ".* moves ",
    "event": r".* (appears|vanishes|changes to \w+) at ",
    "scene": "",
}


def test_every_kind_of_picture_is_described_for_equally_many_tokens() -> None:
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    half = (0.5, 0.5, 0.5)
    spec = MediaSpec(8, 2, 256, 64, half, half, frames_per_chunk=4, sample_fps=4.0)
    sources = Sources(tokenizer, spec, python_corpus(), 100)
    rng = random.Random(3)
    tokens = Counter[str]()
    for _ in range(1500):
        example = sources.caption(rng)
        text = tokenizer.decode([i for i, target in zip(example.ids, example.loss_mask, strict=True) if target])
        tokens[next(kind for kind, begin in KINDS.items() if re.match(begin, text))] += len(example.ids)
    assert set(tokens) == set(KINDS)
    for kind, count in tokens.items():
        families = 2 if kind == "scene" else 1  # boxes and counts are told alike
        assert count / tokens.total() == pytest.approx(families / 7, rel=0.15), kind
