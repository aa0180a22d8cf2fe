"""Raw signals of the PARL reward (section 3), each in [0, 1]; `rl/shaping` weighs them, a task's scorer adds `perf`."""

from baltoro.agent.trace import Trace


def parallel(trace: Trace) -> float:
    """r_parallel: the share of agents that work on a subtask of their own and did not wait for an earlier cohort; 0
    without agents.

    n subtasks in one stage give 1 - 1/n; n subtasks in n stages give 0, as does a single agent. An agent that is told
    what another was told already is not one that works in parallel.
    """
    # The report names this term (an "instantiation reward" against serial collapse) and gives no closed form.
    cohorts = sum(1 for stage in trace.stages if stage)
    agents = len(trace.children)
    return max(len({subtask(child) for child in trace.children}) - cohorts, 0) / agents if agents else 0.0


def finish(trace: Trace) -> float:
    """r_finish: the share of subagents that finished a subtask; 0 without subagents. One subtask given to several
    counts once, so that assigning the same again and again is no way to a higher reward."""
    # The report names this term (the "sub-agent finish rate") and does not say when a subagent has finished.
    subtasks = trace.children
    done = {subtask(child) for child in subtasks if finished(child)}
    return len(done) / len(subtasks) if subtasks else 0.0


def subtask(child: Trace) -> tuple[str, ...]:
    """What it was told: system prompt, if any, and task."""
    return tuple(message.text for message in child.messages if message.role in ("system", "user"))[:2]


def finished(child: Trace) -> bool:
    """It answered of its own accord, and with something."""
    return child.status == "completed" and child.final_text.strip().lower() not in ("", "not found")


def with_swarm_signals(trace: Trace) -> Trace:
    return trace.with_signals(parallel=parallel(trace), finish=finish(trace))
