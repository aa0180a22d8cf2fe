"""The report of one run: one HTML file that needs nothing else, read from the files of the run folder.

What a run has not produced (it stopped early) is named in its place; the rest of the page stands.
"""

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from baltoro.report import sections
from baltoro.report.markup import Html, el
from baltoro.report.sections import need, some

Json = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Writes `report.html` into the run folder, whole or not at all. OSError where the disk does not take it."""
    # A lone surrogate, which JSON can carry, becomes a replacement character in the browser.
    page = f"<!doctype html>\n{_page(folder)}\n".encode("utf-8", "xmlcharrefreplace")
    target, scratch = folder / "report.html", folder / "report.html.writing"
    scratch.write_bytes(page)
    return scratch.replace(target)


def _page(folder: Path) -> Html:
    try:
        results: Json = sections.read(folder, "results.json")
    except sections.Missing:
        results = {}
    name = str(results.get("name", folder.name))
    body = [
        _section("How the run was made", "", lambda: sections.how(need(results, "stages"), results)),
        _section(
            "Loss, stage by stage", "Thin: every step. Thick: smoothed.", lambda: sections.losses(folder, results)
        ),
        _section(
            "Watching it learn",
            "The model's own output on one fixed held-out prompt.",
            lambda: sections.live(folder),
        ),
        _section(
            "Vision, on examples never seen",
            "The bar is the accuracy, the upright mark is what guessing would score.",
            lambda: sections.vision(need(results, "vision")),
        ),
        _section(
            "Held-out examples",
            "What the model was asked, what it answered, and the truth.",
            lambda: sections.gallery(some(sections.read(folder, "examples.json"), "examples")),
        ),
        _section(
            "Joint text-vision RL",
            "Mean outcome reward of text and vision tasks trained together.",
            lambda: sections.rl(need(results, "rl")),
        ),
        _section(
            "PARL: learning to work in parallel",
            "Figure 4 of the report. Nothing in the prompt asks for parallel work; the λ are annealed.",
            lambda: sections.parl(need(results, "parl")),
        ),
        _section(
            "Single agent against swarm",
            "Table 6 of the report: the same budget of critical steps for both.",
            lambda: sections.versus(results),
        ),
        _section(
            "Item-F1 against critical steps",
            "Figure 8 of the report: what each budget of critical steps buys.",
            lambda: sections.scaling(need(results, "wide_search")),
        ),
        _section("One swarm run", "", lambda: sections.runs(folder)),
    ]
    header = el("header", el("h1", f"Baltoro · {name}"), _headlines(results))
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        # A second wall behind the escaping: the browser runs no script but ours and loads nothing.
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"Baltoro · {name}"),
        el("style", Html(_asset("page.css"))),
    )
    return el("html", head, el("body", header, el("main", *body), el("script", Html(script))), lang="en")


def _asset(name: str) -> str:
    return files("baltoro.report").joinpath(name).read_text(encoding="utf-8")


def _section(title: str, lead: str, content: Callable[[], Html]) -> Html:
    return el(
        "section", el("h2", title), *([el("p", lead, class_="lead")] if lead else []), sections.or_missing(content)
    )


def _headlines(results: Json) -> Html:
    """The five most telling numbers; a dash where the run lacks one."""
    cards: list[Html] = []
    for label, read in (
        ("Item-F1, agent swarm", _swarm),
        ("Item-F1, single agent", _single),
        ("Fewer critical steps", _fewer),
        ("Parallelism by PARL", _parallelism),
        ("Vision accuracy", _vision),
    ):
        try:
            value, against = read(results)
        except KeyError as gap:
            value, against = "–", f"not in this run: {gap.args[0]}"
        cards.append(el("div", el("dt", label), el("dd", el("b", value), el("small", against))))
    return el("dl", *cards, class_="headlines")


def _swarm(results: Json) -> tuple[str, str]:
    swarm = need(results, "wide_search")["swarm"]
    return f"{swarm['item_f1']:.2f}", f"wide search, {swarm['n']} held-out tasks"


def _single(results: Json) -> tuple[str, str]:
    wide = need(results, "wide_search")
    return f"{wide['single']['item_f1']:.2f}", f"same budget of {wide['budget']} critical steps"


def _fewer(results: Json) -> tuple[str, str]:
    ratio, level = sections.fewer_steps(need(results, "wide_search"))
    return f"{ratio:.1f}×", f"swarm against single agent at item-F1 {level:.2f}"


def _parallelism(results: Json) -> tuple[str, str]:
    parl = need(results, "parl")
    value = f"{parl['parallelism_before']:.1f} → {parl['parallelism_after']:.1f}"
    return value, "subagents side by side, before and after"


def _vision(results: Json) -> tuple[str, str]:
    tasks = need(results, "vision").values()
    chance = fmean(task["chance"] for task in tasks)
    return f"{fmean(task['accuracy'] for task in tasks):.0%}", f"mean of {len(tasks)} tasks, chance {chance:.0%}"
