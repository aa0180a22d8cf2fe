"""The held-out evaluation of a finished run: vision by task, wide search by mode and budget, real documents."""

from dataclasses import dataclass

from baltoro.agent.engine import Engine
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.eval.vision import VisionResult, evaluate_boxes_by_code, evaluate_vision
from baltoro.eval.wide import Job, WideResult, evaluate_wide, held_out_jobs, package_jobs
from baltoro.swarm.wide import Mode, WideRules
from baltoro.tools.python import Sandbox, SandboxUnavailable


@dataclass(frozen=True)
class EvaluationConfig:
    """n of each; wide search over `entities` rows under `budget` critical steps, and under `budgets` for the curve
    (Figure 8); `packages_per_task` rows of installed packages under `package_budget`."""

    vision_n: int
    code_n: int
    wide_n: int
    entities: tuple[int, int]
    budget: int
    budgets: tuple[int, ...]
    curve_n: int
    packages_per_task: int
    package_budget: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """wide, packages: by mode. curve: by mode, one result per budget. boxes_by_code: None where the machine's kernel
    does not allow the sandbox."""

    vision: dict[str, VisionResult]
    boxes_by_code: float | None
    jobs: list[Job]
    wide: dict[Mode, WideResult]
    curve: dict[Mode, list[WideResult]]
    package_jobs: list[Job]
    packages: dict[Mode, WideResult]


MODES: tuple[Mode, ...] = ("single", "swarm")


async def evaluate(
    engine: Engine, tokenizer: Tokenizer, media: MediaSpec, config: EvaluationConfig, rules: WideRules, seed: int
) -> Evaluation:
    """`engine` serves the roles agent and orchestrator (the same weights) and subagent."""
    jobs = held_out_jobs(config.wide_n, *config.entities, seed)
    packages = package_jobs(config.packages_per_task)

    async def wide(mode: Mode, which: list[Job], budget: int | None) -> WideResult:
        return await evaluate_wide(
            engine, tokenizer, media, which, mode=mode, role="agent", budget=budget, rules=rules, seed=seed
        )

    try:
        boxes = await evaluate_boxes_by_code(
            engine, tokenizer, media, "agent", config.code_n, seed, Sandbox(processes=1)
        )
    except SandboxUnavailable:
        boxes = None
    return Evaluation(
        vision=await evaluate_vision(engine, tokenizer, media, "agent", config.vision_n, seed),
        boxes_by_code=boxes,
        jobs=jobs,
        wide={mode: await wide(mode, jobs, config.budget) for mode in MODES},
        curve={mode: [await wide(mode, jobs[: config.curve_n], b) for b in config.budgets] for mode in MODES},
        package_jobs=packages,
        packages={mode: await wide(mode, packages, config.package_budget) for mode in MODES},
    )
