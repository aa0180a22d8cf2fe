"""Critical steps and signals, worked by hand from the formulas of section 3."""

import itertools
from dataclasses import replace

import pytest

from baltoro.agent.trace import Status, Trace, Turn
from baltoro.chat.messages import assistant, system, tool_result, user
from baltoro.swarm.critical import calls, critical_path, critical_steps, parallelism, total_steps
from baltoro.swarm.signals import finish, parallel, with_swarm_signals


def run(*stages: list[Trace], status: Status = "completed", final: str = "ok", results: int = 0) -> Trace:
    """An agent with one turn per stage; `results` tool results in each turn."""
    answers = tuple(tool_result("functions.x:0", "r") for _ in range(results))
    turns = tuple(Turn(0, (), (), 0, assistant(), answers, tuple(stage), 0.0, 0.0, 0.0) for stage in stages)
    return Trace("agent", (), (), (), (), (), turns, status, final, False)


def worker(steps: int, **more: str | int) -> Trace:
    return run(*[[] for _ in range(steps)], **more)  # type: ignore[arg-type]


def told(task: str) -> Trace:
    return replace(worker(1), messages=(user(task),))


def test_critical_steps_by_hand() -> None:
    # Direct calls only: three stages of S_main = 1.
    assert critical_steps(worker(3)) == 3
    # (1 + 0) + (1 + max(2, 5, 3)) + (1 + 0) = 8, while all agents together take 3 + 10 turns.
    trace = run([], [worker(2), worker(5), worker(3)], [])
    assert (critical_steps(trace), total_steps(trace)) == (8, 13)
    # The same ten steps one after another: (1 + 2) + (1 + 5) + (1 + 3) = 13.
    serial = run([worker(2)], [worker(5)], [worker(3)])
    assert (critical_steps(serial), total_steps(serial)) == (13, 13)
    # More agents that do not lengthen the longest branch cost nothing.
    assert critical_steps(run([worker(5)] * 100)) == 6


def test_critical_steps_of_agents_in_agents() -> None:
    # The inner agent takes (1 + 4) + 1 = 6 critical steps in 2 turns, more than its sibling's 5.
    inner = run([worker(4), worker(1)], [])
    assert critical_steps(run([inner, worker(5)])) == 7
    assert critical_path(run([worker(5), inner])) == (1,)


def test_critical_path_takes_the_first_of_equals() -> None:
    assert critical_path(run([], [worker(2), worker(3), worker(3)], [worker(1)])) == (None, 1, 0)


def test_calls_are_counted_in_the_whole_tree() -> None:
    assert calls(run([worker(2, results=3), worker(1, results=1)], [], results=2)) == 2 * 2 + 2 * 3 + 1


def test_parallelism_is_the_mean_width_of_stages_with_agents() -> None:
    assert parallelism(worker(4)) == 0
    assert parallelism(run([], [worker(1)] * 4, [], [worker(1)])) == 2.5


@pytest.mark.parametrize(
    ("widths", "expected"),
    [([], 0.0), ([0, 0], 0.0), ([1], 0.0), ([1, 1, 1], 0.0), ([4], 0.75), ([0, 2, 0, 2], 0.5), ([3, 1], 0.5)],
)
def test_parallel_is_the_share_that_did_not_wait(widths: list[int], expected: float) -> None:
    numbers = itertools.count()
    assert parallel(run(*[[told(f"task {next(numbers)}") for _ in range(width)] for width in widths])) == expected


def test_agents_that_are_told_the_same_do_not_work_in_parallel() -> None:
    # Of five agents four have a subtask of their own, and one of those is the first of its cohort.
    assert parallel(run([told("A"), told("B"), told("A"), told("C"), told("D")])) == (4 - 1) / 5
    assert parallel(run([told("A")] * 8)) == 0
    assert parallel(run([told("A")], [told("A")])) == 0


def test_finish_counts_answers_given_of_the_agents_own_accord() -> None:
    assert finish(worker(3)) == 0
    children = [
        worker(1),
        worker(1, final="Not found "),
        worker(1, final=" "),
        worker(1, status="limit"),
        worker(1, status="overflow", final=""),
        worker(1, status="failed", final=""),
        worker(1, final="not found in May, found in June"),
        worker(1),
    ]
    several = [replace(child, messages=(user(f"task {i}"),)) for i, child in enumerate(children)]
    trace = with_swarm_signals(run(several[:5], several[5:]))
    assert trace.signals == {"parallel": 0.75, "finish": 3 / 8}


def test_one_subtask_given_again_and_again_finishes_once() -> None:
    same = [replace(worker(1), messages=(system("read"), user("A"), user("stop"))) for _ in range(3)]
    other = replace(worker(1), messages=(system("read"), user("B")))
    assert finish(run([*same, other])) == 2 / 4
