"""The K2 tokenizer: byte-level BPE with ranks in a tiktoken file, and control tokens that no text can spell
(model.md section 10)."""

import base64
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

import tiktoken

_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Offsets from the base vocabulary; the ids between them are reserved.
_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "<|media_begin|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "<think>": 22,
    "</think>": 23,
}
_RELEASED_BASE = 163_584
_RELEASED_RESERVED = 256
_RESERVED = 64
# Role words and the like are encoded again and again: as many texts of so many characters are remembered.
_SHORT, _REMEMBERED = 32, 1024


class Tokenizer:
    """Text to ids and back. `encode` never yields an id of `special`, whatever the text; control tokens are placed
    by id. Their ids follow the base vocabulary: 256 for the released file, otherwise 64 and what fills up the
    vocabulary to a multiple of 64."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """`ranks`: the ids 0..n-1 of n byte strings, all 256 single bytes among them; lower ranks merge first."""
        self._encoding = tiktoken.Encoding("k2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._encode_short = lru_cache(_REMEMBERED)(self._encoding.encode_ordinary)
        self._pieces = sorted(ranks, key=ranks.__getitem__)
        base = self.base_size = len(ranks)
        reserved = _RELEASED_RESERVED if base == _RELEASED_BASE else _RESERVED + -base % 64
        self.vocab_size = base + reserved
        offsets = _OFFSETS | {"[UNK]": reserved - 2, "[PAD]": reserved - 1}
        names = {offset: name for name, offset in offsets.items()}
        self.special = {names.get(i, f"<|reserved_token_{base + i}|>"): base + i for i in range(reserved)}
        self._pieces += [name.encode() for name in self.special]

        self.bos = self.special["[BOS]"]
        self.eos = self.special["[EOS]"]
        self.pad = self.special["[PAD]"]
        self.im_end = self.special["<|im_end|>"]
        self.im_user = self.special["<|im_user|>"]
        self.im_assistant = self.special["<|im_assistant|>"]
        self.im_system = self.special["<|im_system|>"]
        self.im_middle = self.special["<|im_middle|>"]
        self.tool_calls_section_begin = self.special["<|tool_calls_section_begin|>"]
        self.tool_calls_section_end = self.special["<|tool_calls_section_end|>"]
        self.tool_call_begin = self.special["<|tool_call_begin|>"]
        self.tool_call_argument_begin = self.special["<|tool_call_argument_begin|>"]
        self.tool_call_end = self.special["<|tool_call_end|>"]
        self.media_begin = self.special["<|media_begin|>"]
        self.media_content = self.special["<|media_content|>"]
        self.media_end = self.special["<|media_end|>"]
        self.media_pad = self.special["<|media_pad|>"]
        self.think = self.special["<think>"]
        self.end_think = self.special["</think>"]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file is cut off or is no tiktoken file."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}, line {number}: expected `base64 rank`; is the file complete?") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError(f"{path}: expected ranks 0..n-1 with all 256 single bytes; is the file complete?")
        return cls(ranks)

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The tiktoken file."""
        pieces = self._pieces[: self.base_size]
        return "".join(f"{base64.b64encode(p).decode()} {rank}\n" for rank, p in enumerate(pieces)).encode()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learns merges on `texts`. `vocab_size` counts the 256 bytes and the 64 reserved ids; it is a multiple of
        64. The vocabulary is smaller if the texts hold fewer merges. Same texts, same order: same result."""
        from tokenizers import Regex, models, pre_tokenizers, trainers  # only training needs the library
        from tokenizers import Tokenizer as BpeTokenizer

        if vocab_size % 64 or vocab_size < 256 + _RESERVED:
            raise ValueError(f"vocab_size is {vocab_size}; it must be a multiple of 64 and at least {256 + _RESERVED}")
        bpe = BpeTokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - _RESERVED, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        byte_of = _bytes_of_letters()
        merges: list[list[str]] = json.loads(bpe.to_str())["model"]["merges"]
        ranks = {bytes([b]): b for b in range(256)}
        for left, right in merges:
            # Two merges may spell one token; the earlier one sets its rank.
            ranks.setdefault(bytes(byte_of[letter] for letter in left + right), len(ranks))
        return cls(ranks)

    def encode(self, text: str) -> list[int]:
        """Ordinary tokens only: text that spells a control token stays text."""
        if len(text) <= _SHORT:
            return list(self._encode_short(text))
        return [token for piece in _bounded(text) for token in self._encoding.encode_ordinary(piece)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Control tokens appear by name."""
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """As `decode_bytes`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _bounded(text: str) -> Iterator[str]:
    """Cuts as the release cuts: every 400,000 characters, and every 25,000 within a run of space or of non-space.

    Without it a long run of spaces overflows the stack of tiktoken's regex engine.
    """
    if len(text) <= 25_000:
        yield text
        return
    for start in range(0, len(text), 400_000):
        part, done = text[start : start + 400_000], 0
        for run in re.finditer(r"\s+|\S+", part) if len(part) > 25_000 else ():
            for end in range(run.start() + 25_000, run.end(), 25_000):
                yield part[done:end]
                done = end
        yield part[done:]


def _bytes_of_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes: printable Latin-1 stands for itself, the other bytes, in
    order, for U+0100 and following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
