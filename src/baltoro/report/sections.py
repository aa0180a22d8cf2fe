"""The sections of the report: each turns what a run recorded into HTML, and raises Missing for what it did not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baltoro.report import timeline
from baltoro.report.figures import Points, curves, loss_curve
from baltoro.report.headline import speedup
from baltoro.report.markup import Html, el, join, media, table
from baltoro.report.run_folder import read_lines

Json = dict[str, Any]


class Missing(KeyError):
    """Something that this run has not produced; the text names it."""


def need(mapping: Json, key: str) -> Any:
    """The value; Missing where it is absent or empty."""
    value = mapping.get(key)
    if value is None or value in ({}, [], ""):
        raise Missing(key)
    return value


def read(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise Missing(name) from None
    except ValueError:
        raise Missing(f"{name} (not readable)") from None


def _lines(folder: Path, name: str) -> list[Json]:
    return some(read_lines(folder / name), name)


def some(values: list[Any], name: str) -> list[Any]:
    if not values:
        raise Missing(name)
    return values


def or_missing(content: Callable[[], Html]) -> Html:
    """The one place where what a run lacks becomes a sentence."""
    try:
        return content()
    except KeyError as gap:
        return el(
            "p",
            "This run has no ",
            el("code", str(gap.args[0])),
            ", so there is nothing to show here.",
            class_="missing",
        )


def how(stages: Json, results: Json) -> Html:
    model = results.get("model", {})
    facts = {
        "command": results.get("command"),
        "commit": results.get("commit"),
        "seed": results.get("seed"),
        "machine": _with(results.get("cores"), "cores, ")
        + _with(results.get("threads"), "threads, ")
        + str(results.get("dtype", "")),
        "wall time": _duration(results["wall_s"]) if "wall_s" in results else None,
        "peak memory": f"{results['peak_rss_mb'] / 1024:.2f} GiB" if "peak_rss_mb" in results else None,
        "model": _with(_count(model.get("parameters")), "parameters, ")
        + _with(_count(model.get("active")), "active per token"),
    }
    rows = [
        [name, str(s.get("what", "")), *_numbers(_duration(s["wall_s"]), _count(s.get("tokens")) or "–", _pair(s))]
        for name, s in stages.items()
    ]
    listed = [
        el("div", el("dt", key), el("dd", "not recorded" if value in (None, "") else str(value)))
        for key, value in facts.items()
    ]
    head = ("stage", "what it learns", "time", "tokens", "loss or reward, first → last")
    return join([el("dl", *listed, class_="facts"), table(head, rows, "Stages")])


def _numbers(*texts: str) -> list[Html]:
    return [el("td", text, class_="num") for text in texts]


def _with(value: object, unit: str) -> str:
    return "" if value in (None, "") else f"{value} {unit}"


def _pair(stage: Json) -> str:
    first, last = stage.get("loss_first"), stage.get("loss_last")
    return "–" if first is None or last is None else f"{first:.3f} → {last:.3f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _count(number: float | None) -> str:
    if number is None:
        return ""
    size = next((size for size in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= size[0]), (1.0, ""))
    return f"{number / size[0]:.3g}{size[1]}"


def _panel(title: str, note: str, figure: Html) -> Html:
    return el("figure", el("figcaption", el("b", title), " ", el("span", note)), figure)


def _panels(panels: Sequence[Html], *, large: bool) -> Html:
    return el("div", *panels, class_="panels large" if large else "panels")


def losses(folder: Path, results: Json) -> Html:
    stages: dict[str, list[tuple[float, float]]] = {}
    for record in _lines(folder, "metrics.jsonl"):
        if record.get("loss") is not None:
            stages.setdefault(record["stage"], []).append((record["step"], record["loss"]))
    what = results.get("stages", {})
    panels = [
        _panel(
            stage,
            str(what.get(stage, {}).get("what", "")),
            loss_curve(
                f"loss{i}",
                points,
                f"Loss of stage {stage}: {points[0][1]:.3f} at first, {points[-1][1]:.3f} at last, {len(points)} steps",
            ),
        )
        for i, (stage, points) in enumerate(some(list(stages.items()), "loss in metrics.jsonl"))
    ]
    return _panels(panels, large=False)


def live(folder: Path) -> Html:
    every = _lines(folder, "live.jsonl")
    rows = [[f"{r['stage']} {r['step']}", el("td", el("code", r["text"]))] for r in every]
    last = len(rows) - 1
    shown = [rows[i] for i in sorted({round(k * last / 11) for k in range(12)})]
    head = ("stage and step", "what the model writes")
    if len(shown) == len(rows):
        return table(head, rows)
    return join([table(head, shown), el("details", el("summary", f"All {len(rows)}"), table(head, rows))])


def vision(tasks: Json) -> Html:
    rows = [
        [
            name,
            el("td", _bar(task["accuracy"], task["chance"]), class_="wide"),
            el("td", f"{task['accuracy']:.1%}", class_="num"),
            el("td", f"{task['chance']:.1%}", class_="num"),
            el("td", str(task["n"]), class_="num"),
        ]
        for name, task in tasks.items()
    ]
    return table(("task", "", "accuracy", "chance", "n"), rows, "Vision accuracy per task")


def _bar(value: float, chance: float) -> Html:
    fill = el("span", style=f"width:{100 * value:.1f}%", class_="fill")
    mark = el("span", style=f"left:{100 * chance:.1f}%", class_="chance")
    return el("div", fill, mark, class_="bar", role="img", aria_label=f"accuracy {value:.0%}, chance {chance:.0%}")


def _verdict(score: float) -> Html:
    sign, word = (
        ("✓", "right") if score >= 0.999 else ("✗", "wrong") if score <= 0.001 else ("◐", f"partly, {score:.2f}")
    )
    return el("span", f"{sign} {word}", class_=f"verdict {word.split(',')[0]}")


def gallery(examples: list[Json]) -> Html:
    cards = [
        el(
            "article",
            media(example.get("media"), f"{example['task']}: {example.get('caption', '')}"),
            el("p", el("b", example["task"]), _verdict(example["score"])),
            el("p", example["question"], class_="question"),
            el(
                "dl",
                el("dt", "model"),
                el("dd", example["answer"]),
                el("dt", "gold"),
                el("dd", _plain(example["gold"])),
            ),
        )
        for example in examples
    ]
    return el("div", *cards, class_="gallery")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _series(curve: list[Json], names: dict[str, str]) -> dict[str, Points]:
    """Shown name -> points over the iterations, for the keys that the curve has."""
    return {
        shown: [(r["iteration"], r[key]) for r in curve if r.get(key) is not None]
        for key, shown in names.items()
        if key in curve[0]
    }


def rl(rl: Json) -> Html:
    series = _series(need(rl, "curve"), {"reward": "all", "vision_reward": "vision", "text_reward": "text"})
    note = f"{rl['reward_before']:.2f} before, {rl['reward_after']:.2f} after"
    figure = curves(
        "rl", series, "iteration", "reward", f"Reward over RL iterations: {note}", limits=(0, 1.02), marked=False
    )
    return _panels([_panel("Reward", note, figure)], large=True)


def parl(parl: Json) -> Html:
    curve: list[Json] = need(parl, "curve")

    def panel(key: str, title: str, note: str, names: dict[str, str], limits: tuple[float, float] | None) -> Html:
        figure = curves(
            key,
            _series(curve, names),
            "iteration",
            title,
            f"{title} over PARL iterations: {note}",
            limits=limits,
            marked=False,
        )
        return _panel(title, note, figure)

    wide = f"{parl['parallelism_before']:.1f} before, {parl['parallelism_after']:.1f} after"
    paid = f"{parl['reward_before']:.2f} before, {parl['reward_after']:.2f} after"
    panels = [
        panel("parl-f1", "Accuracy", f"reward {paid}", {"accuracy": "accuracy"}, (0, 1.02)),
        panel("parl-width", "Parallelism", f"subagents per stage: {wide}", {"parallelism": "parallelism"}, None),
        panel(
            "parl-lambda",
            "λ",
            "what parallel work and finished subtasks still earn",
            {"lambda_parallel": "λ parallel", "lambda_finish": "λ finish"},
            None,
        ),
    ]
    if "critical_steps" in curve[0]:
        panels.insert(2, panel("parl-steps", "Critical steps", "per task", {"critical_steps": "critical steps"}, None))
    return _panels(panels, large=True)


def versus(results: Json) -> Html:
    def rows(key: str, label: Callable[[Json], str]) -> Html:
        part = need(results, key)
        lines = [
            [
                f"{mode}",
                *(
                    el("td", f"{part[mode][number]:.{digits}f}", class_="num")
                    for number, digits in (("item_f1", 3), ("critical_steps", 1), ("total_steps", 1))
                ),
                el("td", str(part[mode]["n"]), class_="num"),
            ]
            for mode in ("single", "swarm")
        ]
        gain = part["swarm"]["item_f1"] - part["single"]["item_f1"]
        head = ("agent", "item-F1", "critical steps", "total steps", "n")
        return join([table(head, lines, label(part)), el("p", f"The swarm scores {gain:+.3f} item-F1.")])

    def wide(part: Json) -> str:
        low, high = part["entities"][0], part["entities"][-1]
        return f"Wide search, held out: {low} to {high} entities, budget {part['budget']} critical steps"

    def real(part: Json) -> str:
        fields = ", ".join(map(str, part["fields"]))
        return (
            f"Real documents: {part['packages']} installed packages by {fields}, budget {part['budget']} critical steps"
        )

    both = [or_missing(lambda: rows("wide_search", wide)), or_missing(lambda: rows("real_documents", real))]
    return el("div", *(el("div", part) for part in both), class_="panels large")


def fewer_steps(wide: Json) -> tuple[float, float]:
    """How many times fewer critical steps the swarm needs, and the item-F1 where that is read off: the highest that
    both reach."""
    curve = need(wide, "curve")
    best = [max(point["item_f1"] for point in need(curve, mode)) for mode in ("single", "swarm")]
    ratio = speedup({"wide_search": wide})
    if ratio is None:
        raise Missing("item-F1 above 0 that both agents reach")
    return ratio, min(best)


def scaling(wide: Json) -> Html:
    curve = need(wide, "curve")
    series: dict[str, Points] = {
        mode: sorted((p["critical_steps"], p["item_f1"]) for p in need(curve, mode)) for mode in ("swarm", "single")
    }
    try:
        ratio, level = fewer_steps(wide)
        note = f"at item-F1 {level:.2f}, the swarm needs {ratio:.1f} times fewer critical steps"
    except Missing as gap:
        note = f"there is no {gap.args[0]}"
    figure = curves(
        "scaling",
        series,
        "critical steps",
        "item-F1",
        f"Item-F1 against critical steps: {note}",
        limits=(0, 1.04),
        marked=True,
    )
    rows = [
        [
            mode,
            *(
                el("td", f"{p[key]:.{d}f}", class_="num")
                for key, d in (("budget", 0), ("critical_steps", 1), ("item_f1", 3))
            ),
        ]
        for mode in ("swarm", "single")
        for p in curve[mode]
    ]
    numbers = el("details", el("summary", "The numbers"), table(("agent", "budget", "critical steps", "item-F1"), rows))
    return _panels([_panel("Item-F1", note, figure), el("div", numbers)], large=True)


def runs(folder: Path) -> Html:
    swarm: Json = read(folder, "swarm.json")
    try:
        runs = {"swarm": swarm, "single": read(folder, "single.json")}
        without = Html()
    except Missing as gap:
        runs = {"swarm": swarm}
        without = el("p", f"This run has no {gap.args[0]} to set beside it.", class_="missing")
    groups = [
        timeline.lanes(run["trace"], key, "orchestrator" if key == "swarm" else "single agent")
        for key, run in runs.items()
    ]
    scores = [
        f"{key}: item-F1 {run['item_f1']:.2f}, {run['critical_steps']} critical steps" for key, run in runs.items()
    ]
    legend = el(
        "p",
        el("span", class_="key model"), "model call ",
        el("span", class_="key tool"), "tool call ",
        el("span", class_="key waiting"), "waiting for subagents ",
        el("span", class_="key critical"),
        "on the critical path: the main agent, and of each stage the agent with the most steps (first among equals)",
        class_="legend",
    )  # fmt: skip
    parts = [
        el("p", "The task:"),
        el("pre", str(swarm["task"]["prompt"])),
        el(
            "p",
            "; ".join(scores) + ". Both run on one axis of time. Point at a bar to read it, click to find it below.",
        ),
        without,
        legend,
        timeline.chart(groups),
        el("aside", id="peek", hidden="", aria_hidden="true"),
    ]
    for (key, run), group in zip(runs.items(), groups, strict=True):
        title = "The swarm" if key == "swarm" else "The single agent"
        parts += [
            el("h3", f"{title}: what each was asked, read and answered"),
            timeline.agents(group, run.get("media", {})),
            el("h3", f"{title}: the final table against gold"),
            timeline.cells(run["task"], run["trace"]["final_text"]),
        ]
    return join(parts)
