"""The whole recipe of the report in one command: ViT, joint pre-training, long context, zero-vision SFT, joint RL,
PARL, evaluation, report. Every stage leaves one checkpoint; run again, a finished stage is loaded and an unfinished
one goes on where it stopped."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import resource
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.loop import Limits, derive_seed
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Message
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.config import dump
from baltoro.config import load as load_config
from baltoro.data.mixture import Mixture, Source
from baltoro.data.sources import Sources
from baltoro.eval.evaluation import Evaluation, EvaluationConfig, evaluate
from baltoro.eval.record import episode, gallery, numbers
from baltoro.eval.wide import WideResult, evaluate_wide, held_out_jobs
from baltoro.model.config import PRESETS, ModelConfig, TextConfig, Yarn
from baltoro.model.init import induction_heads, initialise
from baltoro.model.kimi import KimiK25, count_parameters
from baltoro.report.headline import headline
from baltoro.report.html import write_report as write_html
from baltoro.report.progress import Progress as Display
from baltoro.report.run_folder import RunFolder, commit
from baltoro.rl.black_box import Program, program
from baltoro.rl.shaping import ParlShaping
from baltoro.rl.trainer import IterationReport, Opened, RLConfig, Tasks, Weights, run_rl
from baltoro.rollout.env import Agent, Env
from baltoro.rollout.env import World as EnvWorld
from baltoro.rollout.judge import Policy, Task
from baltoro.rollout.questions import questions
from baltoro.rollout.record import write_episodes
from baltoro.serve.live import LivePrompt
from baltoro.serve.load import Loaded, ServeConfig, threads
from baltoro.serve.local import LocalEngine
from baltoro.swarm.critical import critical_steps, parallelism
from baltoro.swarm.demonstrations import Demonstrator
from baltoro.swarm.wide import WideRules, wide_env
from baltoro.train.machine import prepare_machine
from baltoro.train.stage import StageConfig, StepReport, run_stage
from baltoro.train.state import load_state, read_progress
from baltoro.world.corpora import folder_corpus, python_corpus
from baltoro.world.entities import World
from baltoro.world.lexicon import lexicon


@dataclass(frozen=True)
class ParlConfig:
    """PARL: `entities` bounds the rows of a training task, `budget` its critical steps."""

    rl: RLConfig
    shaping: ParlShaping
    entities: tuple[int, int]
    budget: int


@dataclass(frozen=True)
class AgentsConfig:
    """single, cohort: bounds on the entities of a demonstration; widths: (width, weight) of the cohorts that SFT shows,
    width 0 for all at once."""

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
    """The small dense language model of the ViT stage: the main one's widths with fewer and narrower layers."""

    num_layers: int
    intermediate_size: int

    def of(self, text: TextConfig) -> TextConfig:
        return dataclasses.replace(
            text, num_layers=self.num_layers, first_k_dense=self.num_layers, intermediate_size=self.intermediate_size
        )


@dataclass(frozen=True)
class RecipeConfig:
    """A run file. `model` names a preset, `vocab_size` is that of the tokenizer trained for it; `dtype` "auto" is
    bfloat16 where the processor multiplies it in hardware. `induction` wires the circuit of `model.init`. `corpus` is
    a folder of text; without it, Python's own documentation and library. `black_box`: joint RL's look-ups are made by a
    program of its own, through the gateway."""

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


_LEARNS = {
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
        self.model = self._fresh(self.model_config)
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
        with self.folder.replacing(path) as scratch:
            tokenizer.save(scratch)
        return tokenizer

    def _live_prompt(self) -> LivePrompt:
        rng = random.Random("live")
        messages = Demonstrator(World(0, "heldout")).subagent(rng)
        prompt = render(messages[:-1], self.tokenizer, self.config.media, add_generation_prompt=True)
        return LivePrompt(f"{messages[0].text} {messages[1].text}", prompt)

    def _fresh(self, config: ModelConfig) -> KimiK25:
        model = KimiK25(config, self.tokenizer.media_pad, self.dtype)
        generator = torch.Generator().manual_seed(self.config.seed)
        initialise(model, generator)
        if self.config.induction:
            induction_heads(model, generator)
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
        self.display.stage(name, _LEARNS[name], stage.steps, done)
        mixture = Mixture(sources, stage.shares, stage.tokens, derive_seed(self.config.seed, *name.encode()))

        def report(step: StepReport) -> None:
            self.folder.log(name, **dataclasses.asdict(step))
            self._show(
                name, model or self.model, step.step, {"loss": step.loss, "tokens/s": step.tokens / step.seconds}
            )

        progress = run_stage(name, model or self.model, stage, mixture, checkpoint, report)
        self.folder.end_stage(name, _LEARNS[name], progress.seconds, progress.tokens, "loss")

    def _show(self, name: str, model: KimiK25, done: int, metrics: dict[str, float]) -> None:
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
            "orchestrator": lambda r: chat(demonstrator.orchestrator(r, *cohort, widths)),
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
        self.descend("sft", c.sft, lambda rng: self.text_sources(rng, agents.single, agents.cohort, agents.widths))

    def _train_tower(self, sources: Callable[[random.Random], Mapping[str, Source]]) -> None:
        """The tower learns with a small language model (the report's is Moonlight), which is then left behind."""
        captioner = dataclasses.replace(self.model_config, text=self.config.captioner.of(self.model_config.text))
        small = self._fresh(captioner)
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

    def joint_rl(self) -> None:
        """Outcome rewards on pictures and on look-ups together (2.3); with `black_box` the look-ups are made by
        `swarm.client`, behind the gateway."""
        agents = self.config.agents
        look_up = wide_env("single", 8, agents.rules, (1, 2))
        pictures = questions("train")

        engine = self.engine({"policy": self.model})

        def tasks(seed: int) -> tuple[Env, Task]:
            env = look_up if random.Random(seed).random() < 0.25 else pictures
            return env, env.sample(seed)

        @contextlib.asynccontextmanager
        async def opened() -> AsyncGenerator[Tasks]:
            if not self.config.black_box:
                yield tasks
                return
            command = (sys.executable, "-m", "baltoro.swarm.client")
            context = agents.rules.max_context_tokens
            async with program(command, engine, self.tokenizer, self.config.media, "policy", context) as running:

                def outside(seed: int) -> tuple[Env, Task]:
                    env, task = tasks(seed)
                    return (dataclasses.replace(env, agent=_client(running, task)) if env is look_up else env), task

                yield outside

        def record(report: IterationReport) -> dict[str, float]:
            return {
                "vision_reward": report.mean_of("perf", pictures.name),
                "text_reward": report.mean_of("perf", look_up.name),
            }

        self._reinforce("rl", self.config.rl, self.model, engine, "policy", opened, lambda _: {"perf": 1.0}, record)

    def parl(self) -> None:
        """A trainable orchestrator over subagents frozen at the weights it starts from (section 3)."""
        config = self.config.parl
        frozen = KimiK25(self.model_config, self.tokenizer.media_pad, self.dtype)
        frozen.load_state_dict(self.model.state_dict())
        iterations = config.rl.iterations
        env = wide_env("swarm", config.budget, self.config.agents.rules, config.entities)

        def record(report: IterationReport) -> dict[str, float]:
            first, second = config.shaping.lambdas(report.iteration - 1, iterations)
            return {
                "accuracy": report.mean_of("perf", env.name),
                "parallelism": report.mean(parallelism),
                "critical_steps": report.mean(critical_steps),
                "finish": report.mean_of("finish", env.name),
                "lambda_parallel": first,
                "lambda_finish": second,
            }

        self._reinforce(
            "parl",
            config.rl,
            self.model,
            self.engine({"orchestrator": self.model, "subagent": frozen}),
            "orchestrator",
            lambda: contextlib.nullcontext(lambda seed: (env, env.sample(seed))),
            lambda iteration: config.shaping.weights(iteration, iterations),
            record,
        )

    def _reinforce(
        self,
        name: str,
        config: RLConfig,
        model: KimiK25,
        engine: LocalEngine,
        role: str,
        opened: Opened,
        weights: Weights,
        record: Callable[[IterationReport], dict[str, float]],
    ) -> None:
        checkpoint = self.folder.checkpoint(name)
        done = read_progress(checkpoint).step if checkpoint.exists() else 0
        self.folder.begin_stage(name, done)
        self.display.stage(name, _LEARNS[name], config.iterations, done)
        draw = Sampling(self.config.agents.rules.max_turn_tokens)
        policy = Policy(self.tokenizer, self.config.media, draw, role, declare_tools=False)
        episodes = self.folder.path / "episodes" / f"{name}.jsonl"

        def report(iteration: IterationReport) -> None:
            numbers = {"reward": iteration.reward, **record(iteration)}
            update = iteration.update
            self.folder.log(
                name,
                step=iteration.iteration,
                seconds=iteration.seconds,
                tokens=iteration.tokens,
                **numbers,
                loss=update.loss,
                grad_norm=update.grad_norm,
                outside=update.outside,
                mismatch=update.mismatch,
                **{f"mismatch_age_{age}": gap for age, gap in update.mismatch_by_age.items()},
            )
            self._show(name, model, iteration.iteration, numbers)
            if iteration.iteration == config.iterations:
                episodes.unlink(missing_ok=True)
                write_episodes(episodes, iteration.records, self.tokenizer, self.config.media)

        progress = run_rl(
            name,
            model,
            engine,
            config,
            opened,
            policy,
            weights,
            derive_seed(self.config.seed, *name.encode()),
            checkpoint,
            report,
        )
        self.folder.end_stage(name, _LEARNS[name], progress.seconds, progress.tokens, "reward")

    def evaluate(self) -> None:
        """Held-out tasks with the final weights; the orchestrator's width before and after PARL by the same tasks."""
        config = self.config.evaluation
        begin = time.monotonic()
        self.display.stage("evaluation", _LEARNS["evaluation"], 2)
        before = self._load("rl")
        after = self._load("parl")
        rules, seed = self.config.agents.rules, self.config.seed

        async def run() -> tuple[WideResult, Evaluation]:
            start = self.engine({"orchestrator": before, "subagent": before})
            async with start.run():
                jobs = held_out_jobs(config.wide_n, *config.entities, seed)
                first = await evaluate_wide(
                    start,
                    self.tokenizer,
                    self.config.media,
                    jobs,
                    mode="swarm",
                    role="orchestrator",
                    budget=config.budget,
                    rules=rules,
                    seed=seed,
                    temperature=1.0,
                )
            self.display.update(1, {"parallelism before PARL": first.parallelism})
            engine = self.engine({"orchestrator": after, "agent": after, "subagent": before})
            async with engine.run():
                return first, await evaluate(engine, self.tokenizer, self.config.media, config, rules, seed)

        first, final = asyncio.run(run())
        self.display.update(2, {mode: result.item_f1 for mode, result in final.wide.items()})
        self._record(first, final, time.monotonic() - begin)

    def _load(self, stage: str) -> KimiK25:
        model = KimiK25(self.model_config, self.tokenizer.media_pad, self.dtype)
        load_state(self.folder.checkpoint(stage), model)
        return model

    def _record(self, first: WideResult, final: Evaluation, seconds: float) -> None:
        config = self.config.evaluation
        folder = self.folder
        parl = folder.metrics("parl")
        rl = folder.metrics("rl")
        total, active = count_parameters(self.model)
        stages = folder.results["stages"]
        folder.update(
            name=folder.path.name,
            command=f"baltoro recipe configs/{self.config.model}.toml",
            wall_s=sum(stage["wall_s"] for stage in stages.values()) + seconds,
            evaluation_s=seconds,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            cores=os.cpu_count(),
            threads=self.config.threads,
            dtype=str(self.dtype).removeprefix("torch."),
            seed=self.config.seed,
            commit=self.commit,
            model={"parameters": total, "active": active},
            rl={
                "curve": [{"iteration": m["step"], **m} for m in rl],
                "reward_before": rl[0]["reward"],
                "reward_after": rl[-1]["reward"],
            },
            parl={
                "parallelism_before": first.parallelism,
                "parallelism_after": final.wide["swarm"].parallelism,
                "reward_before": parl[0]["accuracy"],
                "reward_after": parl[-1]["accuracy"],
                "item_f1_before": first.item_f1,
                "curve": [{"iteration": m["step"], **m} for m in parl],
            },
            **numbers(final, config),
        )
        folder.write_json("examples.json", gallery(final.vision))
        for mode, result in final.wide.items():
            folder.write_json(f"{mode}.json", episode(final.jobs[0], result.traces[0]))


def _client(running: Program, task: Task) -> Agent:
    """`swarm.client` as the agent of a look-up."""
    from baltoro.swarm.client import Job  # brings openai, which only black boxes need

    async def agent(engine: Engine, policy: Policy, world: EnvWorld, limits: Limits) -> Trace:
        (question,) = world.prompt
        assert isinstance(question, str)
        assert limits.critical_steps
        seed = policy.sampling.seed
        job = Job(
            policy.role, task["world"], task["split"], question, seed, limits.critical_steps, limits.max_turn_tokens
        )
        answer, trace = await running.solve(str(seed), dataclasses.asdict(job))
        return dataclasses.replace(trace, final_text=answer)

    return agent


def run_recipe(config: RecipeConfig) -> None:
    """Everything, from wherever the run folder stands. Prints where the report lies and its most telling numbers."""
    folder = RunFolder(config.folder)
    folder.check_config(dump(config))
    with Display(config.expected_s) as display:
        run = Run(config, folder, display)
        run.supervised()
        run.joint_rl()
        run.parl()
        run.evaluate()
    report = write_html(folder.path)
    print(f"\nreport: {report}")
    for line in headline(folder.results):
        print(f"  {line}")


def write_report(config: RecipeConfig) -> None:
    """The HTML file again, from a finished run's records."""
    if not (config.folder / "results.json").exists():
        raise FileNotFoundError(f"{config.folder}: no results.json; run `baltoro recipe` first")
    print(write_html(config.folder))


def open_run(folder: Path, settings: ServeConfig) -> Loaded:
    """The model of a run folder as one of its stages left it. Raises ValueError, OSError."""
    config = load_config(folder / "config.json", (), RecipeConfig)
    results = folder / "results.json"
    finished = json.loads(results.read_text())["stages"] if results.exists() else {}
    stage = settings.stage or next((name for name in ("parl", "rl", "sft") if name in finished), "")
    checkpoint = folder / "checkpoints" / f"{stage}.safetensors"
    stages = sorted({path.stem for path in checkpoint.parent.glob("*.safetensors")} - {"vit"})  # of a smaller model
    if stage not in stages:
        wanted = f"checkpoint of {stage}" if stage else "finished stage from sft on"
        raise ValueError(f"{folder} has no {wanted}; choose with stage= from: {', '.join(stages) or 'none'}")
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    base = PRESETS[config.model]
    yarn = None if stage in ("projector", "pretrain") else config.longctx.yarn
    text = dataclasses.replace(base.text, vocab_size=tokenizer.vocab_size, yarn=yarn)
    dtype = prepare_machine(threads(settings), settings.dtype)
    model = KimiK25(dataclasses.replace(base, text=text), tokenizer.media_pad, dtype)
    load_state(checkpoint, model)
    return Loaded(model, tokenizer, config.media, config.agents.rules.max_context_tokens)


def ablate_parl(config: RecipeConfig) -> None:
    """PARL again without r_parallel and without r_finish, from the same checkpoint (what each term is for)."""
    main = RunFolder(config.folder)
    if not main.checkpoint("rl").exists():
        raise FileNotFoundError(f"{config.folder}: no finished RL stage; run `baltoro recipe` first")
    parts = {"without-parallel": {"lambda_parallel": 0.0}, "without-finish": {"lambda_finish": 0.0}}
    curves: dict[str, list[dict[str, float]]] = {}
    with Display(dict.fromkeys(("parl",), config.expected_s["parl"])) as display:
        for name, change in parts.items():
            shaping = dataclasses.replace(config.parl.shaping, **change)
            folder = RunFolder(config.folder / "ablations" / name)
            part = dataclasses.replace(config, parl=dataclasses.replace(config.parl, shaping=shaping))
            folder.check_config(dump(part))
            run = Run(part, folder, display, tokenizer=Tokenizer.load(config.folder / "tokenizer.tiktoken"))
            run.stretch()
            load_state(main.checkpoint("rl"), run.model)
            run.parl()
            curves[name] = folder.metrics("parl")
    for name, curve in curves.items():
        print(name, {k: (curve[0][k], curve[-1][k]) for k in ("accuracy", "parallelism", "finish")})
