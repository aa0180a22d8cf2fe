"""One agent run over time: agents as lanes, calls as bars, the critical path marked; below it, everything they said.

Works on the JSON of `agent.trace.Trace.to_json`.
"""

from dataclasses import dataclass
from itertools import zip_longest
from math import floor, log10
from typing import Any

from baltoro.report.markup import Html, el, media, table
from baltoro.score.table import item_f1, parse_table

Json = dict[str, Any]

_LABELS, _WIDTH, _LANE, _TOP = 200.0, 1100.0, 22.0, 34.0
_SHORTEST = 2.5
"""Units that even the shortest bar is wide, to be seen."""


@dataclass(frozen=True)
class Lane:
    """One agent. `anchor` names its entry in the list below; `critical`: it is on the critical path."""

    name: str
    anchor: str
    depth: int
    critical: bool
    trace: Json


def lanes(trace: Json, anchor: str, name: str) -> list[Lane]:
    """The agent, then all agents below it in the order they were started."""
    found: list[Lane] = []

    def visit(run: Json, name: str, depth: int, critical: bool) -> None:
        found.append(Lane(name, f"{anchor}-{len(found)}", depth, critical, run))
        for turn in run["turns"]:
            longest = _longest(turn["children"])
            for index, child in enumerate(turn["children"]):
                label = f"{child['role']} {len(found)} · {_asked(child)}"
                visit(child, label, depth + 1, critical and index == longest)

    visit(trace, name, 0, True)
    return found


def steps(trace: Json) -> int:
    """Critical steps, as `swarm.critical` counts them."""
    return sum(1 + max(map(steps, turn["children"]), default=0) for turn in trace["turns"])


def _longest(children: list[Json]) -> int | None:
    """The stage's critical agent: the first among those with the most steps, as in `swarm.critical`."""
    return max(range(len(children)), key=lambda i: steps(children[i])) if children else None


def _asked(trace: Json) -> str:
    users = [message for message in trace["prompt"] if message["role"] == "user"]
    return " ".join(_text(users[-1]).split()) if users else ""


def _text(message: Json) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def chart(groups: list[list[Lane]]) -> Html:
    """All lanes of all runs on one axis of seconds, a gap between runs."""
    every = [lane for group in groups for lane in group]
    end = max((turn["ended"] for lane in every for turn in lane.trace["turns"]), default=0.0) or 1.0
    scale = (_WIDTH - _LABELS - 24) / end
    height = _TOP + _LANE * len(every) + 18 * (len(groups) - 1) + 30
    parts: list[Html] = [_hatching()]
    for second in _ticks(end):
        x = _LABELS + second * scale
        parts.append(el("line", x1=_n(x), x2=_n(x), y1=_TOP - 6, y2=height - 24, class_="grid"))
        parts.append(el("text", f"{second:g} s", x=_n(x), y=height - 8, class_="tick"))
    y = _TOP
    for group in groups:
        parts += _turn_marks(group[0], scale, y)
        for lane in group:
            parts.append(_lane(lane, scale, y))
            y += _LANE
        y += 18
    label = "Timeline: one lane per agent, time from left to right. Each bar is described in the list below."
    svg = el("svg", *parts, viewBox=f"0 0 {_WIDTH:g} {_n(height)}", role="img", aria_label=label)
    return el("div", svg, class_="scroll timeline", tabindex=0, role="region", aria_label="Timeline, scrollable")


def _lane(lane: Lane, scale: float, y: float) -> Html:
    room = 30 - 2 * lane.depth
    short = lane.name if len(lane.name) <= room else lane.name[: room - 1] + "…"
    label = el("text", el("title", lane.name), short, x=8 + 10 * lane.depth, y=_n(y + 15), class_="lane")
    bars: list[Html] = []
    tools: list[Html] = []
    for number, turn in enumerate(lane.trace["turns"], 1):
        target = f"{lane.anchor}-t{number}"
        began, wrote, ended = (_LABELS + turn[key] * scale for key in ("started", "generated", "ended"))
        says = turn["text"] or ", ".join(f"{call['name']} {call['arguments']}" for call in turn["calls"])
        times = f"{turn['started']:.2f} to {turn['generated']:.2f} s"
        title = (
            f"{lane.name}\nturn {number}, model call, {times}\nread {turn['prompt_len']} tokens, wrote: {says[:400]}"
        )
        width = max(wrote - began, _SHORTEST)
        box = {"x": _n(began), "y": _n(y + 3), "width": _n(width), "height": 16}
        inside = [el("title", title), el("rect", **box, rx=2, class_="model")]
        if lane.critical:
            inside.append(el("rect", **box, rx=2, class_="critical"))
        if width > 13:
            inside.append(el("text", str(number), x=_n(began + width / 2), y=_n(y + 14.5), class_="number"))
        tools += _tool_bars(lane, turn, number, wrote, ended, y)
        # The list below is the way in for the keyboard: hundreds of bars would be hundreds of tab stops.
        bars.append(el("a", *inside, href=f"#{target}", data_turn=target, tabindex=-1))
    # Tools last: many take milliseconds, and their bars would lie under the next model call.
    return el("g", label, *bars, *tools)


def _tool_bars(lane: Lane, turn: Json, number: int, wrote: float, ended: float, y: float) -> list[Html]:
    """Calls of one turn run at the same time, so they share the height; waiting for agents is one thin line."""
    target = f"{lane.anchor}-t{number}"
    took = f"{turn['generated']:.2f} to {turn['ended']:.2f} s"
    width = max(ended - wrote, _SHORTEST)

    def bar(title: str, top: float, height: float, kind: str) -> Html:
        rect = el("rect", x=_n(wrote), y=_n(top), width=_n(width), height=_n(height), class_=kind)
        return el("a", el("title", title), rect, href=f"#{target}", data_turn=target, tabindex=-1)

    if turn["children"]:
        title = f"{lane.name}\nturn {number}, waiting for {len(turn['children'])} agents, {took}"
        return [bar(title, y + 9, 4, "waiting")]
    names = [*(f"{call['name']} {call['arguments']}" for call in turn["calls"]), "malformed call"]
    each = 10 / max(len(turn["results"]), 1)
    return [
        bar(
            f"{lane.name}\nturn {number}, {names[i]}, {took}\nread: {_text(result)[:400]}",
            y + 6 + i * each,
            max(each - 0.5, 0.5),
            "tool",
        )
        for i, result in enumerate(turn["results"])
    ]


def _turn_marks(lane: Lane, scale: float, y: float) -> list[Html]:
    """Where the main agent's turns begin; a number is left out where it would touch the one before."""
    marks: list[Html] = []
    free = 0.0
    for number, turn in enumerate(lane.trace["turns"], 1):
        x = _LABELS + turn["started"] * scale
        if x >= free:
            marks.append(el("text", f"turn {number}", x=_n(x), y=_n(y - 5), class_="turn-mark"))
            free = x + 44
    return marks


def _hatching() -> Html:
    line = el("path", d="M0 6 L6 0", class_="hatch")
    return el("defs", el("pattern", line, id="hatching", width=6, height=6, patternUnits="userSpaceOnUse"))


def _ticks(end: float) -> list[float]:
    """Round seconds, at most a dozen of them, from 0."""
    rough = end / 8
    power = 10.0 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [round(i * step, 9) for i in range(int(end / step) + 1)]


def _n(value: float) -> str:
    return f"{value:.1f}"


def agents(group: list[Lane], pictures: Json) -> Html:
    """What each agent was asked, read and answered."""
    return el("div", *(_agent(lane, pictures) for lane in group), class_="agents")


def _agent(lane: Lane, pictures: Json) -> Html:
    run = lane.trace
    answer = " ".join(run["final_text"].split())
    tail = f"{len(run['turns'])} turns, {run['status']}: {answer[:80]}{'…' if len(answer) > 80 else ''}"
    mark = el("span", "critical path", class_="badge") if lane.critical and lane.depth else Html()
    summary = el("summary", el("b", lane.name), mark, el("small", tail))
    asked = [_message(message, message["role"], pictures) for message in run["prompt"]]
    turns = [_turn(turn, f"{lane.anchor}-t{i}", i, pictures) for i, turn in enumerate(run["turns"], 1)]
    failed = [_said("error", run["error"], "failed")] if run["error"] else []
    return el("details", summary, *asked, *turns, *failed, id=lane.anchor, class_=f"agent depth{min(lane.depth, 2)}")


def _turn(turn: Json, anchor: str, number: int, pictures: Json) -> Html:
    parts: list[Html] = []
    if turn["reasoning"].strip():
        parts.append(_said("thinks", turn["reasoning"], "thinks"))
    if turn["text"].strip():
        parts.append(_said("answers", turn["text"], "answers"))
    # Results stand in the order of their calls; one more tells of calls that could not be read.
    for call, result in zip_longest(turn["calls"], turn["results"]):
        if call:
            parts.append(_said("calls", f"{call['name']} {call['arguments']}", "calls"))
        if result:
            parts.append(_message(result, "reads", pictures))
    facts = (
        f"{turn['started']:.2f} to {turn['ended']:.2f} s, {turn['prompt_len']} tokens read, {turn['sampled']} written"
    )
    return el("section", el("h5", f"Turn {number} ", el("small", facts)), *parts, id=anchor, class_="turn")


def _message(message: Json, label: str, pictures: Json) -> Html:
    content = [
        el("pre", part["text"])
        if part["type"] == "text"
        else media(pictures.get(part["hash"]), f"{part['type']} of shape {part['shape']} that the agent saw")
        for part in message["content"]
    ]
    return el("div", el("span", label, class_="who"), el("div", *content), class_="said")


def _said(label: str, text: str, kind: str) -> Html:
    return el("div", el("span", label, class_="who"), el("pre", text), class_=f"said {kind}")


def cells(task: Json, answer: str) -> Html:
    """The answer's table cell by cell. A cell is right where it scores as an item of item-F1."""
    columns: list[str] = list(task["columns"])
    predicted = parse_table(answer, columns)
    by_name = {_fold(name): row for name, row in reversed(predicted.items())}
    rows: list[list[str]] = []
    for name, gold in task["gold"].items():
        row = by_name.get(_fold(name), {})
        rows.append([name, *(_cell(column, row.get(column, ""), gold[column]) for column in columns)])
    asked = {_fold(name) for name in task["gold"]}
    for name, row in predicted.items():
        if _fold(name) not in asked:
            extra = [_cell(column, row[column], "") if row.get(column) else "–" for column in columns]
            rows.append([f"{name} (not asked for)", *extra])
    score = item_f1(predicted, task["gold"])
    return table(("name", *columns), rows, f"{sum(map(len, task['gold'].values()))} cells, item-F1 {score:.2f}")


def _fold(name: str) -> str:
    return " ".join(name.lower().split())


def _cell(column: str, value: str, gold: str) -> Html:
    right = bool(value) and item_f1({"": {column: value}}, {"": {column: gold}}) == 1
    if right:
        return el("td", "✓ ", value, class_="right")
    return el(
        "td", "✗ ", value or "(none)", *([el("br"), el("small", f"gold: {gold}")] if gold else []), class_="wrong"
    )
