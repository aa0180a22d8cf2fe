"""What a process of a run learns, and its supervised stages."""

import dataclasses
import random
from collections.abc import Callable, Mapping

import torch

from baltoro.agent.loop import derive_seed
from baltoro.chat.tokenizer import Tokenizer
from baltoro.data.mixture import Mixture, Source
from baltoro.data.sources import Sources
from baltoro.model.config import PRESETS, ModelConfig
from baltoro.model.init import induction_heads, initialise, whiten_patches
from baltoro.model.kimi import KimiK25
from baltoro.recipe.settings import RecipeConfig
from baltoro.report.run_folder import checkpoint_path
from baltoro.swarm.demonstrations import Demonstrator
from baltoro.train.machine import peak_memory_mb, prepare_machine
from baltoro.train.packing import pack
from baltoro.train.parallel import ALONE, Group
from baltoro.train.stage import StageConfig, StepReport, run_stage
from baltoro.train.state import Progress
from baltoro.world.corpora import Corpus, folder_corpus, python_corpus
from baltoro.world.entities import World
from baltoro.world.tasks import COLUMNS, LABELS

_WHITENED = 1024
"""Pictures whose patches the tower's embedding begins to whiten."""
_FAILING = 0.1
"""Share of subagents without an answer, from long context on: one that fails is not to harm the others' rows."""


def corpus_of(config: RecipeConfig) -> Corpus:
    return folder_corpus(config.corpus) if config.corpus else python_corpus()


def follow(config: RecipeConfig, group: Group) -> None:
    """The supervised stages as a process that `Run` started to share their steps."""
    tokenizer = Tokenizer.load(config.folder / "tokenizer.tiktoken")
    Learner(config, corpus_of(config), tokenizer, group).supervised()


class Learner:
    """The model, what it learns from, and the supervised stages in order; silent by itself."""

    def __init__(self, config: RecipeConfig, corpus: Corpus, tokenizer: Tokenizer, group: Group = ALONE):
        self.config = config
        self.tokenizer = tokenizer
        self.group = group
        self.dtype = prepare_machine(config.threads // group.size, config.dtype)
        base = PRESETS[config.model]
        self.model_config = dataclasses.replace(
            base, text=dataclasses.replace(base.text, vocab_size=tokenizer.vocab_size)
        )
        self.model = self._fresh(self.model_config, induction=config.induction)
        self.sources = Sources(tokenizer, config.media, corpus, config.passage_tokens)
        self.peak_mb = 0.0

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
        learning, group = model or self.model, self.group
        seed = derive_seed(self.config.seed, group.rank, *name.encode())
        mixture = Mixture(sources, stage.shares, stage.tokens // group.size, seed)
        self.begun(name, stage)
        progress = run_stage(
            name,
            learning,
            stage,
            mixture,
            checkpoint_path(self.config.folder, name),
            lambda step: self.stepped(name, learning, step),
            group,
        )
        self.ended(name, progress)

    def begun(self, name: str, stage: StageConfig) -> None: ...

    def stepped(self, name: str, model: KimiK25, step: StepReport) -> None: ...

    def ended(self, name: str, progress: Progress) -> None: ...

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
            "longctx",
            c.longctx.stage,
            lambda rng: self.text_sources(rng, c.longctx.single, c.longctx.cohort, agents.widths, _FAILING),
        )
        self.descend(
            "sft", c.sft, lambda rng: self.text_sources(rng, agents.single, agents.cohort, agents.widths, _FAILING)
        )
        peak = torch.tensor([peak_memory_mb()])
        self.group.add([peak])
        self.peak_mb = float(peak)

    def _train_tower(self, sources: Callable[[random.Random], Mapping[str, Source]]) -> None:
        """The tower learns with a small language model (the report's is Moonlight), which is then left behind."""
        captioner = dataclasses.replace(self.model_config, text=self.config.captioner.of(self.model_config.text))
        small = self._fresh(captioner, induction=False)  # its few heads are to read pictures
        if self.group.rank == 0 and not checkpoint_path(self.config.folder, "vit").exists():
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
