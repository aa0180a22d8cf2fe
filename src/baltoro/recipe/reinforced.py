"""The stages of reinforcement learning: joint on pictures and look-ups, then PARL."""

import contextlib
import dataclasses
import random
import sys
from collections.abc import AsyncGenerator, Callable

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.loop import Limits, derive_seed
from baltoro.agent.trace import Trace
from baltoro.model.kimi import KimiK25
from baltoro.recipe.run import LEARNS, Run
from baltoro.report.run_folder import checkpoint_path
from baltoro.rl.black_box import Program, program
from baltoro.rl.trainer import IterationReport, Opened, RLConfig, Tasks, Weights, run_rl
from baltoro.rollout.env import Agent, Env, World
from baltoro.rollout.judge import Policy, Task
from baltoro.rollout.questions import questions
from baltoro.rollout.record import write_episodes
from baltoro.serve.local import LocalEngine
from baltoro.swarm.critical import critical_steps, parallelism
from baltoro.swarm.wide import wide_env
from baltoro.train.state import read_progress


def joint_rl(run: Run) -> None:
    """Outcome rewards on pictures and on look-ups together (2.3); with `black_box` the look-ups are made by
    `swarm.client`, behind the gateway."""
    agents = run.config.agents
    look_up = wide_env("single", 8, agents.rules, (1, 2))
    pictures = questions("train")
    engine = run.engine({"policy": run.model})

    def tasks(seed: int) -> tuple[Env, Task]:
        env = look_up if random.Random(seed).random() < 0.25 else pictures
        return env, env.sample(seed)

    @contextlib.asynccontextmanager
    async def opened() -> AsyncGenerator[Tasks]:
        if not run.config.black_box:
            yield tasks
            return
        command = (sys.executable, "-m", "baltoro.swarm.client")
        context = agents.rules.max_context_tokens
        async with program(command, engine, run.tokenizer, run.config.media, "policy", context) as running:

            def outside(seed: int) -> tuple[Env, Task]:
                env, task = tasks(seed)
                return (dataclasses.replace(env, agent=_client(running, task)) if env is look_up else env), task

            yield outside

    def record(report: IterationReport) -> dict[str, float]:
        return {
            "vision_reward": report.mean_of("perf", pictures.name),
            "text_reward": report.mean_of("perf", look_up.name),
        }

    _reinforce(run, "rl", run.config.rl, engine, "policy", opened, lambda _: {"perf": 1.0}, record)


def parl(run: Run) -> None:
    """A trainable orchestrator over subagents frozen at the weights it starts from (section 3)."""
    config = run.config.parl
    frozen = KimiK25(run.model_config, run.tokenizer.media_pad, run.dtype)
    frozen.load_state_dict(run.model.state_dict())
    iterations = config.rl.iterations
    env = wide_env("swarm", config.budget, run.config.agents.rules, config.entities)

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

    _reinforce(
        run,
        "parl",
        config.rl,
        run.engine({"orchestrator": run.model, "subagent": frozen}),
        "orchestrator",
        lambda: contextlib.nullcontext(lambda seed: (env, env.sample(seed))),
        lambda iteration: config.shaping.weights(iteration, iterations),
        record,
    )


def _reinforce(
    run: Run,
    name: str,
    config: RLConfig,
    engine: LocalEngine,
    role: str,
    opened: Opened,
    weights: Weights,
    record: Callable[[IterationReport], dict[str, float]],
) -> None:
    checkpoint = checkpoint_path(run.folder.path, name)
    done = read_progress(checkpoint).step if checkpoint.exists() else 0
    run.folder.begin_stage(name, done)
    run.display.stage(name, LEARNS[name], config.iterations, done)
    draw = Sampling(run.config.agents.rules.max_turn_tokens)
    policy = Policy(run.tokenizer, run.config.media, draw, role, declare_tools=False)
    episodes = run.folder.path / "episodes" / f"{name}.jsonl"

    def report(iteration: IterationReport) -> None:
        numbers = {"reward": iteration.reward, **record(iteration)}
        update = iteration.update
        run.folder.log(
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
        run.show(name, run.model, iteration.iteration, numbers)
        if iteration.iteration == config.iterations:
            episodes.unlink(missing_ok=True)
            write_episodes(episodes, iteration.records, run.tokenizer, run.config.media)

    progress = run_rl(
        name,
        run.model,
        engine,
        config,
        opened,
        policy,
        weights,
        derive_seed(run.config.seed, *name.encode()),
        checkpoint,
        report,
    )
    run.folder.end_stage(name, LEARNS[name], progress.seconds, progress.tokens, "reward")


def _client(running: Program, task: Task) -> Agent:
    """`swarm.client` as the agent of a look-up."""
    from baltoro.swarm.client import Job  # brings openai, which only black boxes need

    async def agent(engine: Engine, policy: Policy, world: World, limits: Limits) -> Trace:
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
