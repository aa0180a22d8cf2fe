"""Critical steps, the measure of time in a swarm (section 3), and what else counts steps and width."""

from statistics import fmean

from baltoro.agent.trace import Trace


def critical_steps(trace: Trace) -> int:
    """Sum over stages of (S_main = 1) + max over the stage's agents of their steps; 0 for a stage without agents.

    A stage is one turn of the main agent. An agent that itself starts agents counts its own critical steps.
    """
    return sum(1 + max((critical_steps(child) for child in stage), default=0) for stage in trace.stages)


def critical_path(trace: Trace) -> tuple[int | None, ...]:
    """Per stage, which of its agents took the most critical steps (the first among equals); None without agents."""
    return tuple(
        max(range(len(stage)), key=lambda index, stage=stage: critical_steps(stage[index])) if stage else None
        for stage in trace.stages
    )


def total_steps(trace: Trace) -> int:
    """Turns of all agents: what a single agent would have to do one after another."""
    return len(trace.turns) + sum(total_steps(child) for child in trace.children)


def calls(trace: Trace) -> int:
    """Answered tool calls of all agents, the step unit of E.8."""
    return sum(len(turn.results) for turn in trace.turns) + sum(calls(child) for child in trace.children)


def parallelism(trace: Trace) -> float:
    """Mean number of agents per stage that has agents; 0 where no stage has any."""
    widths = [len(stage) for stage in trace.stages if stage]
    return fmean(widths) if widths else 0.0
