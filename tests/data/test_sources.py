import random
import re
import string
from collections import Counter

import pytest

from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.data.sources import Sources
from baltoro.world.corpora import python_corpus
from baltoro.world.entities import World

KINDS = {
    "digit": "digit ",
    "ocr": "text ",
    "chart": "bars ",
    "motion": ".* moves ",
    "event": r".* (appears|vanishes|changes to \w+) at ",
    "scene": "",
}


@pytest.fixture(scope="module")
def sources() -> Sources:
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    half = (0.5, 0.5, 0.5)
    spec = MediaSpec(8, 2, 256, 64, half, half, frames_per_chunk=4, sample_fps=4.0)
    return Sources(tokenizer, spec, python_corpus(), 100)


def test_a_restated_list_ends_where_its_labels_do(sources: Sources) -> None:
    rng, tokenizer, lists = random.Random(5), sources.tokenizer, 0
    for _ in range(100):
        example = sources.restated(rng, World(rng.randrange(100), "train"))
        if example.ids[-1] != tokenizer.im_end:
            continue
        begin = example.loss_mask.index(1)
        assert all(example.loss_mask[begin:])
        given = tokenizer.decode(example.ids[:begin]).split("\n")
        told = tokenizer.decode(example.ids[begin:-1]).split("\n")
        count = len(told) - 1
        assert "".join(row[0] for row in told) == "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰"[: count + 1]
        assert [row.split("|")[0] for row in told[:-1]] == [line.split("|")[0] for line in given[:count]]
        assert not any(row.startswith(told[-1]) for row in given)
        lists += 1
    assert lists > 30


def test_every_letter_is_a_target_of_restated_text(sources: Sources) -> None:
    rng, tokenizer, said = random.Random(6), sources.tokenizer, Counter[int]()
    world = World(1, "train")
    for _ in range(2000):
        example = sources.restated(rng, world)
        said.update(i for i, target in zip(example.ids, example.loss_mask, strict=True) if target)
    assert all(tokenizer.encode(letter)[0] in said for letter in string.ascii_letters)


def test_every_kind_of_picture_takes_equally_much_work_and_some_twice_as_much(sources: Sources) -> None:
    rng = random.Random(3)
    work = Counter[str]()  # in patches; a token of the language model costs as much as four
    for _ in range(1500):
        example = sources.caption(rng)
        text = sources.tokenizer.decode([i for i, target in zip(example.ids, example.loss_mask, strict=True) if target])
        patches = sum(len(item.patches) for item in example.media)
        work[next(kind for kind, begin in KINDS.items() if re.match(begin, text))] += 4 * len(example.ids) + patches
    assert set(work) == set(KINDS)
    for kind, count in work.items():
        # Colours, shapes, counts, boxes, points and polygons are of scenes, which are told alike.
        shares = {"scene": 6, "ocr": 2, "motion": 2, "event": 2}.get(kind, 1)
        assert count / work.total() == pytest.approx(shares / 14, rel=0.2), kind


def test_a_picture_is_shown_once_and_asked_about_again(sources: Sources) -> None:
    """Questions behind the first are never the first again."""
    rng, turns = random.Random(4), Counter[int]()
    for _ in range(200):
        example = sources.question(rng)
        text = sources.tokenizer.decode([i for i in example.ids if i != sources.tokenizer.media_pad])
        asked = re.findall(r"<\|im_user\|>user<\|im_middle\|>(.*?)<\|im_end\|>", text, re.DOTALL)
        questions = [question.split("<|media_end|>")[-1].strip() for question in asked]
        assert "describe" not in questions[:-1]
        assert len(set(questions)) == len(questions)
        assert len(example.media) == (2 if "happen" in questions[0] else 1)  # chunks of four frames
        turns[len(questions)] += 1
    assert set(turns) == {1, 2, 3, 4}
