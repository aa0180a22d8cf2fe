"""The text that a small tokenizer is trained on: what the built-in world is written in, and real English and code."""

import random
from collections.abc import Iterator, Sequence

from baltoro.chat.messages import Message
from baltoro.world.corpora import Corpus
from baltoro.world.names import FIRST, LAST, WORDS
from baltoro.world.tasks import LABELS
from baltoro.world.vision import VISION_TASKS


def lexicon(dialogues: Sequence[Sequence[Message]], corpus: Corpus, rng: random.Random) -> Iterator[str]:
    """Deterministic for a given generator. Words of the world are repeated until each is worth a token of its own."""
    for dialogue in dialogues:
        for message in dialogue:
            yield f"{message.role}\n{message.text}"
            yield message.reasoning
            for call in message.tool_calls:
                yield from (call.id, call.arguments)
            if message.tool_call_id:
                yield f"## Return of {message.tool_call_id}\n"
    for _ in range(60):
        yield "\n".join(FIRST)
        yield " " + " ".join((*LAST, *WORDS))
        yield " ".join(map(str, range(100)))
        yield "\n".join(LABELS)
    for task in VISION_TASKS.values():
        for _ in range(60):
            example = task.sample(rng, "train")
            yield "\n".join((example.question, example.answer, example.caption))
    for _ in range(300):
        yield corpus.passage(rng, 800)
