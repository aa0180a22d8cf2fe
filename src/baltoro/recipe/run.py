"""One run of the recipe: its folder, its display and what it learns."""

import dataclasses
import random
import time
from functools import partial

import torch

from baltoro.chat.messages import Message
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.kimi import KimiK25
from baltoro.recipe.learner import Learner, corpus_of, follow
from baltoro.recipe.settings import RecipeConfig
from baltoro.report.progress import Progress as Display
from baltoro.report.run_folder import RunFolder, checkpoint_path, commit
from baltoro.rollout.record import replacing
from baltoro.serve.live import LivePrompt
from baltoro.serve.local import LocalEngine
from baltoro.swarm.demonstrations import Demonstrator
from baltoro.train.machine import prepare_machine
from baltoro.train.parallel import leading
from baltoro.train.stage import StageConfig, StepReport
from baltoro.train.state import Progress, read_progress
from baltoro.world.corpora import Corpus
from baltoro.world.entities import World
from baltoro.world.lexicon import lexicon

LEARNS = {
    "vit": "the vision tower learns to describe pictures and clips",
    "projector": "only the projector learns, to fit the tower to the language model",
    "pretrain": "text and vision together, at one constant ratio",
    "longctx": "the same with longer contexts, stretched by YaRN",
    "sft": "text-only demonstrations of tools and agents (zero-vision SFT)",
    "rl": "joint reinforcement learning on pictures and look-ups",
    "parl": "the orchestrator learns when to work in parallel; subagents are frozen",
    "evaluation": "held-out tasks",
}


def _tokenizer(config: RecipeConfig, corpus: Corpus) -> Tokenizer:
    """The run's tokenizer, trained and saved the first time."""
    path = config.folder / "tokenizer.tiktoken"
    if path.exists():
        return Tokenizer.load(path)
    rng = random.Random(f"tokenizer {config.seed}")
    dialogues: list[list[Message]] = []
    for number in range(12):
        demonstrator = Demonstrator(World(number, "train"))
        dialogues += [demonstrator.subagent(rng) for _ in range(40)]
        dialogues += [demonstrator.single(rng, 2, 6) for _ in range(6)]
        dialogues += [demonstrator.pixels(rng) for _ in range(6)]
        dialogues += [demonstrator.orchestrator(rng, 2, 12, [(1, 1.0), (0, 1.0)]) for _ in range(6)]
    tokenizer = Tokenizer.train(list(lexicon(dialogues, corpus, rng)), config.vocab_size)
    with replacing(path) as scratch:
        tokenizer.save(scratch)
    return tokenizer


class Run(Learner):
    """Learns before a person's eyes, and leaves a record. Methods are the stages, in order."""

    def __init__(self, config: RecipeConfig, folder: RunFolder, display: Display, tokenizer: Tokenizer | None = None):
        self.folder = folder
        self.display = display
        self.commit = commit()  # now: the tree may change while the run goes on
        corpus = corpus_of(config)
        # Once for all sittings: other processes may make the other type the faster one in the next.
        dtype = prepare_machine(config.threads, folder.results.get("dtype", config.dtype))
        folder.update(dtype=str(dtype).removeprefix("torch."))
        config = dataclasses.replace(config, dtype=folder.results["dtype"])
        super().__init__(config, corpus, tokenizer or _tokenizer(config, corpus))
        self.live = self._live_prompt()
        self._shown = float("-inf")

    def _live_prompt(self) -> LivePrompt:
        rng = random.Random("live")
        messages = Demonstrator(World(0, "heldout")).subagent(rng)
        prompt = render(messages[:-1], self.tokenizer, self.config.media, add_generation_prompt=True)
        return LivePrompt(f"{messages[0].text} {messages[1].text}", prompt)

    def supervised(self) -> None:
        """By as many processes as the run file says, unless all is done."""
        c = self.config
        size = 1 if self._done("sft") == c.sft.steps else c.processes
        with leading(size, c.folder / "meeting", partial(follow, c)) as self.group:
            torch.set_num_threads(c.threads // size)
            super().supervised()
        torch.set_num_threads(c.threads)
        self.folder.update(peak_rss_mb=max(self.peak_mb, self.folder.results.get("peak_rss_mb", 0)))

    def _done(self, stage: str) -> int:
        """How many of its steps are."""
        checkpoint = checkpoint_path(self.config.folder, stage)
        return read_progress(checkpoint).step if checkpoint.exists() else 0

    def begun(self, name: str, stage: StageConfig) -> None:
        done = self._done(name)
        self.folder.begin_stage(name, done)
        self.display.stage(name, LEARNS[name], stage.steps, done)

    def stepped(self, name: str, model: KimiK25, step: StepReport) -> None:
        self.folder.log(name, **dataclasses.asdict(step))
        self.show(name, model, step.step, {"loss": step.loss, "tokens/s": step.tokens / step.seconds})

    def ended(self, name: str, progress: Progress) -> None:
        self.folder.end_stage(name, LEARNS[name], progress.seconds, progress.tokens, "loss")

    def show(self, name: str, model: KimiK25, done: int, metrics: dict[str, float]) -> None:
        if time.monotonic() - self._shown > 10:
            text = self.live.complete(model, self.tokenizer)
            self.display.live(text)
            self.folder.log_live(name, done, text)
            self._shown = time.monotonic()
        self.display.update(done, metrics)

    def engine(self, models: dict[str, KimiK25]) -> LocalEngine:
        agents = self.config.agents
        return LocalEngine(models, self.tokenizer, slots=agents.slots, max_len=agents.rules.max_context_tokens)
