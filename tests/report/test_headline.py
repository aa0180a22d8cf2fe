from typing import Any

import pytest

from baltoro.report.headline import headline, speedup

Points = list[tuple[float, float]]
"""(item-F1, critical steps), a budget each."""


def results(single: Points, swarm: Points) -> dict[str, Any]:
    def points(values: Points) -> list[dict[str, float]]:
        return [{"budget": 4 * i, "item_f1": f1, "critical_steps": steps} for i, (f1, steps) in enumerate(values)]

    return {
        "wide_search": {
            "budget": 10,
            "single": {"item_f1": 0.25},
            "swarm": {"item_f1": 0.8125},
            "curve": {"single": points(single), "swarm": points(swarm)},
        },
        "parl": {"parallelism_before": 1.25, "parallelism_after": 7.75},
        "vision": {"colour": {"accuracy": 0.9, "chance": 0.2}, "shape": {"accuracy": 0.5, "chance": 0.3}},
        "real_documents": {"packages": 40, "single": {"item_f1": 0.1}, "swarm": {"item_f1": 0.6}},
    }


@pytest.mark.parametrize(
    ("single", "swarm", "expected"),
    [
        # The level is 0.8, the swarm's best: 20 steps alone, 6 together.
        ([(0.2, 4), (0.5, 8), (0.9, 20)], [(0.3, 4), (0.8, 6), (0.8, 12)], 20 / 6),
        # The level is 0.5, the single agent's best, which it reaches with 8; the swarm passes it with 6.
        ([(0.2, 4), (0.5, 8), (0.4, 20)], [(0.3, 4), (0.6, 6), (0.9, 12)], 8 / 6),
        # A swarm may lose.
        ([(0.5, 4)], [(0.4, 4), (0.5, 8)], 0.5),
        # More steps do not always help: the cheapest that reaches the level counts, wherever it stands.
        ([(0.7, 30), (0.7, 9)], [(0.7, 12), (0.9, 3)], 3),
        ([(0.0, 4), (0.0, 8)], [(0.5, 4)], None),
    ],
)
def test_speedup_by_hand(single: Points, swarm: Points, expected: float | None) -> None:
    assert speedup(results(single, swarm)) == (expected and pytest.approx(expected))


def test_headline() -> None:
    assert headline(results([(0.9, 20)], [(0.9, 8)])) == [
        "wide search within 10 critical steps, item-F1: swarm 0.812, single agent 0.250",
        "critical steps for equal item-F1: 2.5 times fewer with the swarm",
        "parallelism of the orchestrator: 1.2 before PARL, 7.8 after",
        "vision, mean accuracy over 2 held-out tasks: 0.70 (chance 0.25)",
        "40 real documents, item-F1: swarm 0.600, single agent 0.100",
    ]


def test_headline_without_a_common_level() -> None:
    lines = headline(results([(0.0, 20)], [(0.9, 8)]))
    assert lines[1] == "critical steps for equal item-F1: the modes have none in common"
