"""Training examples from the built-in world and from real text, as token sequences with loss masks."""

import functools
import random
import re
from collections.abc import Callable

from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Message, TokenSequence, assistant, user
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.world.corpora import Corpus
from baltoro.world.entities import World
from baltoro.world.tasks import closed, label, listed, row, template
from baltoro.world.vision import VISION_TASKS, VisionTask

_VISION = list(VISION_TASKS.values())
_SLOW = ("ocr", "motion", "event")
"""What the tower learns last is described twice as much as the rest."""
_FURTHER = 2
"""Questions about one picture beside the first, as far as it has any: they come without its tokens."""


class Sources:
    """Draws examples; every method takes the generator that decides all of the draw."""

    def __init__(self, tokenizer: Tokenizer, media: MediaSpec, corpus: Corpus, passage_tokens: int):
        self.tokenizer = tokenizer
        self.media = media
        self.corpus = corpus
        self.passage_tokens = passage_tokens

    def chat(self, messages: list[Message]) -> TokenSequence:
        return render(messages, self.tokenizer, self.media)

    def text(self, rng: random.Random) -> TokenSequence:
        """Real English and code; every token is a target."""
        ids = self.tokenizer.encode(self.corpus.passage(rng, 5 * self.passage_tokens))[: self.passage_tokens]
        return TokenSequence(ids, [], [1] * len(ids))

    def restated(self, rng: random.Random, world: World) -> TokenSequence:
        """Facts and the same facts again in another order or form: a page and its lines shuffled, a page and rows that
        it fills in, a table's rows in the order of a numbered list, a numbered list of any tokens and its copy: many a
        token is a target nowhere else, and would never be said. Only the second time is a target, for only then the
        text is known."""
        kind = rng.choice(world.kinds)
        chosen = rng.sample(kind.entities, rng.randint(2, 16))
        form = rng.random()
        one_page = form < 0.45
        parts: list[tuple[list[str], list[str]]] = []
        if form < 0.1:
            page = chosen[0].page.split("\n")
            parts = [(page, rng.sample(page[1:], len(page) - 1))]
        elif one_page:
            entity = chosen[0]
            parts = [([entity.page], [])]
            for _ in range(6):
                number = rng.randint(1, 16)
                name = f"{label(number)}{entity.name}"
                columns = rng.sample(kind.keys, rng.randint(2, len(kind.keys)))
                blank = [template(name, columns)] if rng.random() < 0.5 else [template("name", columns), name]
                parts.append((blank, [row(number, entity.name, entity.attributes, columns)]))
        elif form < 0.75:
            columns = rng.sample(kind.keys, rng.randint(1, 3))
            rows = [row(number, e.name, e.attributes, columns) for number, e in enumerate(chosen, 1)]
            parts = [([*listed([e.name for e in chosen]), *rng.sample(rows, len(rows))], [closed(rows)])]
        else:
            rows = listed(["".join(rng.choices(self._pieces, k=rng.randint(1, 6))) for _ in chosen])
            parts = [(rows, [closed(rows)])]
        ids: list[int] = []
        mask: list[int] = []
        for lines, target in ((lines, target) for part in parts for target, lines in enumerate(part)):
            new = self.tokenizer.encode("".join(line + "\n" for line in lines))
            ids += new
            mask += [target] * len(new)
        if not one_page:  # where a list ends is to be known as well
            ids[-1] = self.tokenizer.im_end
        return TokenSequence(ids, [], mask)

    def caption(self, rng: random.Random) -> TokenSequence:
        """Picture or clip -> its full description (alt text, boxes, lettering), with nothing around them: what the
        vision tower learns from. Every family takes equally much work, lettering and clips twice as
        much."""
        (task,) = rng.choices(_VISION, self._caption_odds)
        return self._caption(rng, task)

    def question(self, rng: random.Random) -> TokenSequence:
        """Picture or clip and a question -> the short answer, then further questions about the same picture and, every
        second time, its description. Every family for equally many tokens."""
        (task,) = rng.choices(_VISION, self._question_odds)
        return self._question(rng, task)

    def _caption(self, rng: random.Random, task: VisionTask) -> TokenSequence:
        example = task.sample(rng, "train")
        t = self.tokenizer
        media = render([user(example.media)], t, self.media).media
        pads = sum(self.media.tokens(item.grid_thw) for item in media)
        text = [*t.encode(example.caption), t.im_end]
        return TokenSequence([t.media_pad] * pads + text, media, [0] * pads + [1] * len(text))

    def _question(self, rng: random.Random, task: VisionTask) -> TokenSequence:
        example = task.sample(rng, "train")
        dialogue = [user(example.media, example.question), assistant(example.answer)]
        others = [other for other in example.questions if example.question not in other.wordings]
        for other in rng.sample(others, min(_FURTHER, len(others))):
            dialogue += [user(rng.choice(other.wordings)), assistant(other.answer)]
        if rng.random() < 0.5:
            dialogue += [user("describe"), assistant(example.caption)]
        return self.chat(dialogue)

    @functools.cached_property
    def _pieces(self) -> list[str]:
        """What tokens of names say."""
        said = (self.tokenizer.decode([token]) for token in range(self.tokenizer.base_size))
        return [piece for piece in said if re.fullmatch(r"[\w.-]+", piece, re.ASCII)]

    @functools.cached_property
    def _caption_odds(self) -> list[float]:
        odds = _odds(self._caption, lambda example: len(example.ids) + sum(len(m.patches) for m in example.media) / 4)
        return [2 * each if task.name in _SLOW else each for task, each in zip(_VISION, odds, strict=True)]

    @functools.cached_property
    def _question_odds(self) -> list[float]:
        return _odds(self._question, lambda example: len(example.ids))


def _odds(
    make: Callable[[random.Random, VisionTask], TokenSequence], cost: Callable[[TokenSequence], float]
) -> list[float]:
    """How often to draw each family, so that all cost the same."""
    rng = random.Random(0)
    return [1 / sum(cost(make(rng, task)) for _ in range(32)) for task in _VISION]
