"""The last stage: held-out tasks, and the record of the whole run."""

import asyncio
import os
import time

from baltoro.eval.evaluation import Evaluation
from baltoro.eval.evaluation import evaluate as evaluate_model
from baltoro.eval.record import episode, gallery, numbers
from baltoro.eval.wide import WideResult, evaluate_wide, held_out_jobs
from baltoro.model.kimi import KimiK25, count_parameters
from baltoro.recipe.run import LEARNS, Run
from baltoro.report.run_folder import checkpoint_path
from baltoro.train.machine import peak_memory_mb
from baltoro.train.state import load_state


def evaluate(run: Run) -> None:
    """Held-out tasks with the final weights; the orchestrator's width before and after PARL by the same tasks."""
    config = run.config.evaluation
    begin = time.monotonic()
    run.display.stage("evaluation", LEARNS["evaluation"], 2)
    before = _load(run, "rl")
    after = _load(run, "parl")
    rules, seed = run.config.agents.rules, run.config.seed

    async def measure() -> tuple[WideResult, Evaluation]:
        start = run.engine({"orchestrator": before, "subagent": before})
        async with start.run():
            jobs = held_out_jobs(config.wide_n, *config.entities, seed)
            first = await evaluate_wide(
                start,
                run.tokenizer,
                run.config.media,
                jobs,
                mode="swarm",
                role="orchestrator",
                budget=config.budget,
                rules=rules,
                seed=seed,
                temperature=1.0,
            )
        run.display.update(1, {"parallelism before PARL": first.parallelism})
        engine = run.engine({"orchestrator": after, "agent": after, "subagent": before})
        async with engine.run():
            return first, await evaluate_model(engine, run.tokenizer, run.config.media, config, rules, seed)

    first, final = asyncio.run(measure())
    run.display.update(2, {mode: result.item_f1 for mode, result in final.wide.items()})
    _record(run, first, final, time.monotonic() - begin)


def _load(run: Run, stage: str) -> KimiK25:
    model = KimiK25(run.model_config, run.tokenizer.media_pad, run.dtype)
    load_state(checkpoint_path(run.folder.path, stage), model)
    return model


def _record(run: Run, first: WideResult, final: Evaluation, seconds: float) -> None:
    config = run.config.evaluation
    folder = run.folder
    parl = folder.metrics("parl")
    rl = folder.metrics("rl")
    total, active = count_parameters(run.model)
    stages = folder.results["stages"]
    folder.update(
        name=folder.path.name,
        command=f"baltoro recipe configs/{run.config.model}.toml",
        wall_s=sum(stage["wall_s"] for stage in stages.values()) + seconds,
        evaluation_s=seconds,
        peak_rss_mb=max(peak_memory_mb(), folder.results["peak_rss_mb"]),
        cores=os.cpu_count(),
        threads=run.config.threads,
        processes=run.config.processes,
        seed=run.config.seed,
        commit=run.commit,
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
