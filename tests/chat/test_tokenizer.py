import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from baltoro.chat.tokenizer import PATTERN, Tokenizer

# The released ids of model.md section 10.
RELEASED_IDS = {
    "[BOS]": 163584,
    "[EOS]": 163585,
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "<|start_header_id|>": 163590,
    "<|end_header_id|>": 163591,
    "[EOT]": 163593,
    "<|im_system|>": 163594,
    "<|tool_calls_section_begin|>": 163595,
    "<|tool_calls_section_end|>": 163596,
    "<|tool_call_begin|>": 163597,
    "<|tool_call_argument_begin|>": 163598,
    "<|tool_call_end|>": 163599,
    "<|im_middle|>": 163601,
    "<|media_begin|>": 163602,
    "<|media_content|>": 163603,
    "<|media_end|>": 163604,
    "<|media_pad|>": 163605,
    "<think>": 163606,
    "</think>": 163607,
    "[UNK]": 163838,
    "[PAD]": 163839,
    "<|reserved_token_163589|>": 163589,
    "<|reserved_token_163700|>": 163700,
}


@pytest.fixture(scope="module")
def reference(real_texts: list[str]) -> BpeTokenizer:
    """Hugging Face's own byte-level BPE, trained on the texts and to the base size of the `tokenizer` fixture."""
    bpe = BpeTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, letters])  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        real_texts, trainers.BpeTrainer(vocab_size=2048 - 64, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe


def ends(tokenizer: Tokenizer, text: str) -> list[int]:
    """Byte offset behind each token."""
    total = 0
    return [total := total + len(tokenizer.decode_bytes([i])) for i in tokenizer.encode(text)]


def reference_ends(reference: BpeTokenizer, text: str) -> list[int]:
    # A byte-level token has one letter for each byte.
    total = 0
    return [total := total + len(token) for token in reference.encode(text).tokens]


def test_segments_real_text_as_hugging_face_does(
    tokenizer: Tokenizer, reference: BpeTokenizer, real_texts: list[str]
) -> None:
    for text in real_texts:
        assert ends(tokenizer, text) == reference_ends(reference, text)


@given(text=st.text())
def test_segments_any_text_as_hugging_face_does(tokenizer: Tokenizer, reference: BpeTokenizer, text: str) -> None:
    assert ends(tokenizer, text) == reference_ends(reference, text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("it's we'LL", ["it's", " we'LL"]),
        ("HTTPServer", ["HTTPServer"]),
        ("camelCase", ["camel", "Case"]),
        ("12345", ["123", "45"]),
        ("a天地b", ["a", "天地", "b"]),
        ("x  y", ["x", " ", " y"]),
        ("x \n\n y", ["x", " \n\n", " y"]),
        ("f(x) != {}\n", ["f", "(x", ")", " !=", " {}\n"]),
    ],
)
def test_the_pattern_cuts_words(text: str, pieces: list[str]) -> None:
    """Worked by hand from the eight alternatives; a vocabulary that holds every piece shows the cuts."""
    longer = {piece.encode()[:end] for piece in pieces for end in range(2, len(piece.encode()) + 1)}
    vocabulary = [*(bytes([b]) for b in range(256)), *sorted(longer, key=lambda token: (len(token), token))]
    tokenizer = Tokenizer({token: rank for rank, token in enumerate(vocabulary)})
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == pieces


@given(text=st.text())
def test_any_text_comes_back_and_is_never_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.base_size


def test_text_that_spells_a_control_token_stays_text(tokenizer: Tokenizer) -> None:
    for name in tokenizer.special:
        ids = tokenizer.encode(f"a{name}{name}")
        assert tokenizer.decode(ids) == f"a{name}{name}"
        assert max(ids) < tokenizer.base_size


def test_released_vocabulary_gets_the_released_ids() -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"\xff" + i.to_bytes(3, "big") for i in range(163_584 - 256)]
    tokenizer = Tokenizer({token: rank for rank, token in enumerate(tokens)})
    assert {name: tokenizer.special[name] for name in RELEASED_IDS} == RELEASED_IDS
    assert tokenizer.vocab_size == 163_840
    assert sorted(tokenizer.special.values()) == list(range(163_584, 163_840))
    assert (tokenizer.im_end, tokenizer.media_pad, tokenizer.end_think) == (163586, 163605, 163607)


@pytest.mark.parametrize(("base", "total"), [(256, 320), (257, 384), (320, 384)])
def test_other_vocabularies_keep_the_offsets_and_end_on_a_multiple_of_64(base: int, total: int) -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"%d" % i for i in range(10, 10 + base - 256)]
    tokenizer = Tokenizer({token: rank for rank, token in enumerate(tokens)})
    assert tokenizer.vocab_size == total
    named = {name: i for name, i in RELEASED_IDS.items() if "reserved" not in name and name not in ("[UNK]", "[PAD]")}
    assert {name: tokenizer.special[name] - base for name in named} == {n: i - 163_584 for n, i in named.items()}
    assert (tokenizer.special["[UNK]"], tokenizer.pad) == (total - 2, total - 1)


def test_train_fills_the_vocabulary_and_repeats_exactly(tokenizer: Tokenizer, real_texts: list[str]) -> None:
    assert (tokenizer.base_size, tokenizer.vocab_size) == (2048 - 64, 2048)
    again = Tokenizer.train(iter(real_texts), 2048)
    assert [again.decode_bytes([i]) for i in range(2048)] == [tokenizer.decode_bytes([i]) for i in range(2048)]


def test_train_learns_the_most_frequent_pair_first() -> None:
    # Words are "ab" five times and "cd" three times; then nothing is left to merge, so 62 of the ids stay reserved.
    tokenizer = Tokenizer.train(["ab\nab\nab\nab\nab", "cd\ncd\ncd"], 384)
    assert [tokenizer.decode([i]) for i in range(256, tokenizer.base_size)] == ["ab", "cd"]
    assert tokenizer.vocab_size == 384


def test_train_learns_every_continuation_byte() -> None:
    """64 characters that differ in their last byte alone, 0x80 to 0xBF: one merge of their head, then one for each."""
    characters = [chr(0x4E00 + i) for i in range(64)]
    tokenizer = Tokenizer.train(["\n".join(characters)], 448)
    assert tokenizer.base_size == 256 + 65
    assert all(len(tokenizer.encode(character)) == 1 for character in characters)


@pytest.mark.parametrize("size", [256, 1000])
def test_train_refuses_a_size_that_does_not_fit(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        Tokenizer.train(["text"], size)


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, real_texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "k2.tiktoken"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.special == tokenizer.special
    assert loaded.encode(real_texts[0]) == tokenizer.encode(real_texts[0])
    assert path.read_text().splitlines()[0x61] == "YQ== 97"  # base64 of "a"


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-3], lambda b: b"", lambda b: b"\x00\xff" + b])
def test_a_damaged_file_is_named(tokenizer: Tokenizer, tmp_path: Path, damage) -> None:
    path = tmp_path / "k2.tiktoken"
    tokenizer.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"k2\.tiktoken"):
        Tokenizer.load(path)


def test_long_runs_are_cut_every_25000_characters(tokenizer: Tokenizer) -> None:
    """A run of spaces a million long overflows the regex engine if it is not cut."""
    for letter in (" ", "a"):
        run = tokenizer.encode(letter * 25_000)
        assert tokenizer.encode(letter * 50_000) == run + run
        assert tokenizer.encode("\t." + letter * 60_000 if letter == " " else " " + letter * 60_000) == (
            tokenizer.encode(("\t." if letter == " " else " ") + letter * 25_000)
            + run
            + tokenizer.encode(letter * 10_000)
        )
    assert tokenizer.decode(tokenizer.encode(" " * 1_000_000)) == " " * 1_000_000


def test_text_is_cut_every_400000_characters(tokenizer: Tokenizer) -> None:
    text = "ab" * 5 + " "
    whole = (text * 40_000)[:400_000]
    assert tokenizer.encode(whole + "ing") == tokenizer.encode(whole) + tokenizer.encode("ing")


def test_decode_names_control_tokens_and_marks_broken_characters(byte_tokenizer: Tokenizer) -> None:
    t = byte_tokenizer
    assert t.decode([104, 105, t.im_end, t.pad, t.special["[BOS]"] + 5]) == "hi<|im_end|>[PAD]<|reserved_token_261|>"
    assert t.decode_bytes([0xE5, 0xA4]) == b"\xe5\xa4"
    assert t.decode([0xE5, 0xA4, 0x61]) == "\ufffda"
    assert t.decode(t.encode("\ud800a")) == "\ufffda"


@pytest.mark.skipif("BALTORO_TIKTOKEN" not in os.environ, reason="BALTORO_TIKTOKEN names no released tiktoken.model")
def test_the_released_file_encodes_the_golden_words() -> None:
    tokenizer = Tokenizer.load(Path(os.environ["BALTORO_TIKTOKEN"]))
    assert tokenizer.encode("\n请用中文简短描述这张图片。") == [198, 2066, 557, 16717, 96481, 12180, 24793, 6552, 292]
    assert [tokenizer.encode(word) for word in ("user", "image", "assistant")] == [[2482], [4017], [69702]]
