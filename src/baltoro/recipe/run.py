"""One run of the recipe, and its supervised stages."""

import dataclasses
import random
import time
from collections.abc import Callable, Mapping

import torch

from baltoro.agent.loop import derive_seed
from baltoro.chat.messages import Message
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.data.mixture import Mixture, Source
from baltoro.data.sources import Sources
from baltoro.model.config import PRESETS, ModelConfig
from baltoro.model.init import induction_heads, initialise, whiten_patches
from baltoro.model.kimi import KimiK25
from baltoro.recipe.settings import RecipeConfig
from baltoro.report.progress import Progress as Display
from baltoro.report.run_folder import RunFolder, commit
from baltoro.rollout.record import replacing
from baltoro.serve.live import LivePrompt
from baltoro.serve.local import LocalEngine
from baltoro.swarm.demonstrations import Demonstrator
from baltoro.train.machine import prepare_machine
from baltoro.train.packing import pack
from baltoro.train.stage import StageConfig, StepReport, run_stage
from baltoro.train.state import read_progress
from baltoro.world.corpora import folder_corpus, python_corpus
from baltoro.world.entities import World
from baltoro.world.lexicon import lexicon
from baltoro.world.tasks import COLUMNS, LABELS

_WHITENED = 1024
"""Pictures whose patches the tower's embedding begins to whiten."""
_FAILING = 0.05
"""Share of subagents without an answer in SFT: one that fails is not to harm the others' rows."""

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


class Run:
    """One run of the recipe: its folder, tokenizer, model and display. Methods are the stages, in order."""

    def __init__(self, config: RecipeConfig, folder: RunFolder, display: Display, tokenizer: Tokenizer | None = None):
        self.config = config
        self.folder = folder
        self.display = display
        self.dtype = prepare_machine(config.threads, config.dtype)
        self.commit = commit()  # now: the tree may change while the run goes on
        self.corpus = folder_corpus(config.corpus) if config.corpus else python_corpus()
        self.tokenizer = tokenizer or self._tokenizer()
        base = PRESETS[config.model]
        self.model_config = dataclasses.replace(
            base, text=dataclasses.replace(base.text, vocab_size=self.tokenizer.vocab_size)
        )
        self.model = self._fresh(self.model_config, induction=config.induction)
        self.sources = Sources(self.tokenizer, config.media, self.corpus, config.passage_tokens)
        self.live = self._live_prompt()
        self._shown = float("-inf")

    def _tokenizer(self) -> Tokenizer:
        path = self.folder.path / "tokenizer.tiktoken"
        if path.exists():
            return Tokenizer.load(path)
        rng = random.Random(f"tokenizer {self.config.seed}")
        dialogues: list[list[Message]] = []
        for number in range(12):
            demonstrator = Demonstrator(World(number, "train"))
            dialogues += [demonstrator.subagent(rng) for _ in range(40)]
            dialogues += [demonstrator.single(rng, 2, 6) for _ in range(6)]
            dialogues += [demonstrator.pixels(rng) for _ in range(6)]
            dialogues += [demonstrator.orchestrator(rng, 2, 12, [(1, 1.0), (0, 1.0)]) for _ in range(6)]
        tokenizer = Tokenizer.train(list(lexicon(dialogues, self.corpus, rng)), self.config.vocab_size)
        with replacing(path) as scratch:
            tokenizer.save(scratch)
        return tokenizer

    def _live_prompt(self) -> LivePrompt:
        rng = random.Random("live")
        messages = Demonstrator(World(0, "heldout")).subagent(rng)
        prompt = render(messages[:-1], self.tokenizer, self.config.media, add_generation_prompt=True)
        return LivePrompt(f"{messages[0].text} {messages[1].text}", prompt)

    def _fresh(self, config: ModelConfig, *, induction: bool) -> KimiK25:
        model = KimiK25(config, self.tokenizer.media_pad, self.dtype)
        generator = torch.Generator().manual_seed(self.config.seed)
        initialise(model, generator)
        if induction:
            labels = [self.tokenizer.encode(label)[-1] for label in LABELS]
            columns = [token for column in COLUMNS for token in self.tokenizer.encode(column)]
            induction_heads(model, labels, columns, generator)
        return model

    def descend(
        self,
        name: str,
        stage: StageConfig,
        sources: Callable[[random.Random], Mapping[str, Source]],
        model: KimiK25 | None = None,
    ) -> None:
        """One supervised stage over a mixture of sources, of the model unless another one is given."""
        checkpoint = self.folder.checkpoint(name)
        done = read_progress(checkpoint).step if checkpoint.exists() else 0
        self.folder.begin_stage(name, done)
        self.display.stage(name, LEARNS[name], stage.steps, done)
        mixture = Mixture(sources, stage.shares, stage.tokens, derive_seed(self.config.seed, *name.encode()))

        def report(step: StepReport) -> None:
            self.folder.log(name, **dataclasses.asdict(step))
            self.show(name, model or self.model, step.step, {"loss": step.loss, "tokens/s": step.tokens / step.seconds})

        progress = run_stage(name, model or self.model, stage, mixture, checkpoint, report)
        self.folder.end_stage(name, LEARNS[name], progress.seconds, progress.tokens, "loss")

    def show(self, name: str, model: KimiK25, done: int, metrics: dict[str, float]) -> None:
        if time.monotonic() - self._shown > 10:
            text = self.live.complete(model, self.tokenizer)
            self.display.live(text)
            self.folder.log_live(name, done, text)
            self._shown = time.monotonic()
        self.display.update(done, metrics)

    def text_sources(
        self,
        rng: random.Random,
        single: tuple[int, int],
        cohort: tuple[int, int],
        widths: tuple[tuple[int, float], ...],
        failing: float = 0.0,
    ) -> dict[str, Source]:
        """The sources of one step; they share one training world."""
        world = World(rng.randrange(2**31), "train")
        demonstrator = Demonstrator(world)
        chat = self.sources.chat
        return {
            "text": self.sources.text,
            "restated": lambda r: self.sources.restated(r, world),
            "caption": self.sources.caption,
            "question": self.sources.question,
            "subagent": lambda r: chat(demonstrator.subagent(r)),
            "pixels": lambda r: chat(demonstrator.pixels(r)),
            "single": lambda r: chat(demonstrator.single(r, *single)),
            "orchestrator": lambda r: chat(demonstrator.orchestrator(r, *cohort, widths, failing)),
        }

    def supervised(self) -> None:
        c = self.config
        agents = c.agents
        short = (2, 8)
        even = ((1, 0.5), (0, 0.5))

        def pretraining(rng: random.Random) -> dict[str, Source]:
            return self.text_sources(rng, (1, 4), short, even)

        self._train_tower(pretraining)
        self.descend("projector", c.projector, pretraining)
        self.descend("pretrain", c.pretrain, pretraining)
        self.stretch()
        self.descend(
            "longctx", c.longctx.stage, lambda rng: self.text_sources(rng, c.longctx.single, c.longctx.cohort, even)
        )
        self.descend(
            "sft", c.sft, lambda rng: self.text_sources(rng, agents.single, agents.cohort, agents.widths, _FAILING)
        )

    def _train_tower(self, sources: Callable[[random.Random], Mapping[str, Source]]) -> None:
        """The tower learns with a small language model (the report's is Moonlight), which is then left behind."""
        captioner = dataclasses.replace(self.model_config, text=self.config.captioner.of(self.model_config.text))
        small = self._fresh(captioner, induction=False)  # its few heads are to read pictures
        if not self.folder.checkpoint("vit").exists():
            rng = random.Random("patches")
            shown = pack([self.sources.caption(rng) for _ in range(_WHITENED)], captioner.vision.patch_size)
            generator = torch.Generator().manual_seed(self.config.seed)
            whiten_patches(small.vision_tower, shown.batch.patches, generator)
        self.descend("vit", self.config.vit, sources, small)
        self.model.vision_tower.load_state_dict(small.vision_tower.state_dict())
        self.model.mm_projector.load_state_dict(small.mm_projector.state_dict())

    def stretch(self) -> None:
        """The same weights under YaRN's frequencies and softmax scale."""
        yarn = self.config.longctx.yarn
        self.model_config = dataclasses.replace(
            self.model_config, text=dataclasses.replace(self.model_config.text, yarn=yarn)
        )
        stretched = KimiK25(self.model_config, self.tokenizer.media_pad, self.dtype)
        stretched.load_state_dict(self.model.state_dict())
        self.model = stretched

    def engine(self, models: dict[str, KimiK25]) -> LocalEngine:
        agents = self.config.agents
        return LocalEngine(models, self.tokenizer, slots=agents.slots, max_len=agents.rules.max_context_tokens)
