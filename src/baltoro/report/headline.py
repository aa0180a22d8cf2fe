"""The few numbers that tell most about a run."""

from typing import Any


def speedup(results: dict[str, Any]) -> float | None:
    """How many times fewer critical steps the swarm needs for the item-F1 that both modes reach.

    The level is the lower of the two modes' best; each mode counts with the cheapest budget at which it reaches it.
    """
    curve = results["wide_search"]["curve"]
    level = min(max(point["item_f1"] for point in points) for points in curve.values())
    if level <= 0:
        return None
    steps = {
        mode: min(point["critical_steps"] for point in points if point["item_f1"] >= level)
        for mode, points in curve.items()
    }
    return steps["single"] / steps["swarm"]


def headline(results: dict[str, Any]) -> list[str]:
    wide, parl, real = results["wide_search"], results["parl"], results["real_documents"]
    faster = speedup(results)
    vision = results["vision"].values()
    accuracy = sum(v["accuracy"] for v in vision) / len(vision)
    chance = sum(v["chance"] for v in vision) / len(vision)
    swarm, single = (f"{wide[mode]['item_f1']:.3f}" for mode in ("swarm", "single"))
    real_swarm, real_single = (f"{real[mode]['item_f1']:.3f}" for mode in ("swarm", "single"))
    before, after = parl["parallelism_before"], parl["parallelism_after"]
    fewer = f"{faster:.1f} times fewer with the swarm" if faster else "the modes have none in common"
    return [
        f"wide search within {wide['budget']} critical steps, item-F1: swarm {swarm}, single agent {single}",
        f"critical steps for equal item-F1: {fewer}",
        f"parallelism of the orchestrator: {before:.1f} before PARL, {after:.1f} after",
        f"vision, mean accuracy over {len(vision)} held-out tasks: {accuracy:.2f} (chance {chance:.2f})",
        f"{real['packages']} real documents, item-F1: swarm {real_swarm}, single agent {real_single}",
    ]
