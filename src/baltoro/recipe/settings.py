"""A run file: what the recipe is told."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from baltoro.chat.media import MediaSpec
from baltoro.eval.evaluation import EvaluationConfig
from baltoro.model.config import TextConfig, Yarn
from baltoro.rl.shaping import ParlShaping
from baltoro.rl.trainer import RLConfig
from baltoro.swarm.wide import WideRules
from baltoro.train.stage import StageConfig


@dataclass(frozen=True)
class ParlConfig:
    """PARL: `entities` bounds the rows of a training task, `budget` its critical steps."""

    rl: RLConfig
    shaping: ParlShaping
    entities: tuple[int, int]
    budget: int


@dataclass(frozen=True)
class AgentsConfig:
    """single, cohort: bounds on the entities of a demonstration; widths: (width, weight) of the cohorts that long
    context and SFT show, width 0 for all at once."""

    single: tuple[int, int]
    cohort: tuple[int, int]
    widths: tuple[tuple[int, float], ...]
    rules: WideRules
    slots: int


@dataclass(frozen=True)
class LongContextConfig:
    stage: StageConfig
    yarn: Yarn
    single: tuple[int, int]
    cohort: tuple[int, int]


@dataclass(frozen=True)
class CaptionerConfig:
    """The small dense language model of the ViT stage: the main one's width with less of all else."""

    num_layers: int
    num_heads: int
    intermediate_size: int

    def of(self, text: TextConfig) -> TextConfig:
        return dataclasses.replace(
            text,
            num_layers=self.num_layers,
            first_k_dense=self.num_layers,
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
        )


@dataclass(frozen=True)
class RecipeConfig:
    """A run file. `model` names a preset, `vocab_size` is that of the tokenizer trained for it; `dtype` "auto" is the
    faster one of float32 and bfloat16 where the run begins. `induction` wires the circuit of `model.init`. `corpus` is
    a folder of text; without it, Python's own documentation and library. `black_box`: joint RL's look-ups are made by a
    program of its own, through the gateway. Steps of supervised stages are shared by `processes`, each of which has its
    part of `threads`."""

    folder: Path
    seed: int
    threads: int
    dtype: str
    model: str
    vocab_size: int
    induction: bool
    media: MediaSpec
    passage_tokens: int
    agents: AgentsConfig
    captioner: CaptionerConfig
    vit: StageConfig
    projector: StageConfig
    pretrain: StageConfig
    longctx: LongContextConfig
    sft: StageConfig
    rl: RLConfig
    parl: ParlConfig
    evaluation: EvaluationConfig
    expected_s: dict[str, float]
    black_box: bool
    corpus: Path | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.processes <= self.threads:
            raise ValueError(f"processes is {self.processes}; it must be from 1 to threads, which is {self.threads}")
