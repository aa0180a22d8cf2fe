import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baltoro.agent.trace import Trace, Turn, media_by_hash
from baltoro.chat.messages import Clip, Image, Message, Part, ToolCall, assistant, system, tool_result, user
from baltoro.eval.record import data_uris
from baltoro.report.figures import smooth
from baltoro.report.html import write_report
from baltoro.swarm.critical import critical_path, critical_steps
from baltoro.world.tasks import row

PAYLOAD = (
    "</script></style></title></pre>-->]]><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&lt;"
)
CHROMIUM = Path("/usr/bin/chromium")
STAGES = {
    "vit": "pictures to captions, with a small decoder of its own",
    "projector": "to connect the vision tower to the language model",
    "pretrain": "text and pictures together, at a constant ratio",
    "longctx": "longer contexts, by YaRN",
    "sft": "to use tools and to answer, from text alone",
}
TASKS = {"colour": (0.97, 0.12), "count": (0.81, 0.2), "box": (0.55, 0.04), "point": (0.78, 0.1), "chart": (0.66, 0.05)}
NAMES = [f"{first} {last}" for first in ("Toke", "Mira", "Bano", "Selu") for last in ("Radilo", "Venku", "Ostami")]
GOLD = {name: {"age": str(20 + 3 * i), "colour": ("red", "teal", "ochre")[i % 3]} for i, name in enumerate(NAMES)}


class Clock:
    """Hands out one agent's turns with plausible times."""

    def __init__(self, at: float, rng: np.random.Generator):
        self.at, self.rng, self.read = at, rng, 40

    def turn(self, message: Message, *results: Message, children: tuple[Trace, ...] = ()) -> Turn:
        started, generated = self.at, self.at + float(self.rng.uniform(0.15, 0.5))
        ended = max((child.turns[-1].ended for child in children), default=generated + 0.004 * len(results))
        self.at = ended
        self.read += 30
        wrote = (1,) * 12
        return Turn(self.read, wrote, (-0.1,) * 12, 0, message, results, children, started, generated, ended)


def call(tool: str, index: int, /, **arguments: str) -> ToolCall:
    return ToolCall(f"functions.{tool}:{index}", tool, json.dumps(arguments))


def trace(role: str, opening: list[Message], turns: list[Turn]) -> Trace:
    said = [m for turn in turns for m in (turn.message, *turn.results)]
    return Trace(
        role, (*opening, *said), (1, 2), (0, 1), (0.0, -0.1), (), tuple(turns), "completed", turns[-1].message.text,
        trainable=role == "orchestrator", signals={"perf": 0.9},
    )  # fmt: skip


def line(name: str) -> str:
    return row(NAMES.index(name) + 1, name, GOLD[name], ("age", "colour"))


def subagent(name: str, at: float, rng: np.random.Generator, extra: int = 0) -> Trace:
    clock = Clock(at, rng)
    search, opened = call("search", 0, query=name), call("open", 1, url="17")
    page: list[Part] = [f"{name}\nage: {GOLD[name]['age']}\ncolour: {GOLD[name]['colour']}"]
    if name == NAMES[2]:
        page.append(Image(rng.integers(0, 255, (28, 42, 3), dtype=np.uint8)))
        page.append(Clip(rng.integers(0, 255, (4, 28, 28, 3), dtype=np.uint8), 2.0))
    turns = [clock.turn(assistant(tool_calls=(search,)), tool_result(search.id, f"{name} 17\nToke Other 4"))]
    turns += [clock.turn(assistant(tool_calls=(opened,)), tool_result(opened.id, *page)) for _ in range(1 + extra)]
    turns.append(clock.turn(assistant(line(name), reasoning="the page has both")))
    return trace("subagent", [system("Find name|age|colour"), user(name)], turns)


def swarm(rng: np.random.Generator) -> Trace:
    """12 entities: a stage that creates, a stage of 8 subagents (the fourth is the longest), one of 4, the answer."""
    clock = Clock(0.0, rng)
    create = call("create_subagent", 0, name="reader", system_prompt="Find name|age|colour")
    turns = [clock.turn(assistant(tool_calls=(create,)), tool_result(create.id, "created reader"))]
    for first, cohort in ((0, NAMES[:8]), (8, NAMES[8:])):
        calls = tuple(call("assign_task", first + i, agent="reader", prompt=name) for i, name in enumerate(cohort))
        children = tuple(subagent(name, clock.at + 0.4, rng, extra=first + i == 3) for i, name in enumerate(cohort))
        results = [tool_result(c.id, child.final_text) for c, child in zip(calls, children, strict=True)]
        turns.append(clock.turn(assistant(tool_calls=calls), *results, children=children))
    # 24 cells: one wrong value, one row of two cells left out, one cell that nobody asked for.
    table = [line(name) for name in NAMES[:-1]]
    table[1] = row(2, NAMES[1].upper(), GOLD[NAMES[1]] | {"age": "99"}, ("age", "colour"))
    turns.append(
        clock.turn(assistant("\n".join([*table, row(len(NAMES) + 1, "Nobody Known", {"age": "1"}, ("age",))])))
    )
    return trace("orchestrator", [system("Tools: search."), user("Find name|age|colour\n" + "\n".join(NAMES))], turns)


def single(rng: np.random.Generator) -> Trace:
    clock, turns = Clock(0.0, rng), []
    for i, name in enumerate(NAMES[:4]):
        search, opened = call("search", 2 * i, query=name), call("open", 2 * i + 1, url="17")
        turns.append(clock.turn(assistant(tool_calls=(search,)), tool_result(search.id, f"{name} 17")))
        turns.append(clock.turn(assistant(tool_calls=(opened,)), tool_result(opened.id, f"age: {GOLD[name]['age']}")))
    turns.append(clock.turn(assistant("\n".join(line(name) for name in NAMES[:4]))))
    return trace("agent", [user("Find name|age|colour\n" + "\n".join(NAMES))], turns)


def run_file(run: Trace, f1: float) -> dict[str, Any]:
    pictures = {key: data_uris(media) for key, media in media_by_hash(run).items()}
    task = {"prompt": "Find name|age|colour\n" + "\n".join(NAMES), "columns": ["age", "colour"], "gold": GOLD}
    return {
        "task": task, "item_f1": f1, "critical_steps": critical_steps(run), "trace": run.to_json(), "media": pictures,
    }  # fmt: skip


def fake_run(folder: Path) -> dict[str, Any]:
    """A run's files with plausible numbers; file name -> content, lists of records for .jsonl."""
    rng = np.random.default_rng(0)
    metrics, live = [], []
    for stage in STAGES:
        for step in range(0, 400, 2):
            loss = 1.2 + 6 * np.exp(-step / 60) + rng.normal(0, 0.15)
            metrics.append({"stage": stage, "step": step, "loss": float(loss), "lr": 3e-3, "tokens": 8192})
        for step in range(0, 400, 50):
            live.append(
                {"stage": stage, "step": step, "text": f"a {rng.choice(['red', 'blue', 'the'])} cross <|im_end|>"}
            )
    examples = []
    for i in range(12):
        task = list(TASKS)[i % 5]
        frames = data_uris(Clip(rng.integers(0, 255, (6 if i % 4 == 1 else 1, 28, 42, 3), dtype=np.uint8), 2.0))
        score = (1.0, 0.0, 0.62)[i % 3]
        examples.append(
            {"task": task, "question": "what colour is the cross?", "answer": "teal", "score": score,
             "gold": "teal" if score else [4, 9], "caption": "a teal cross left of a red square", "media": frames}
        )  # fmt: skip
    ramp = np.linspace(0, 1, 24)
    curve = {
        mode: [
            {"budget": b, "critical_steps": b * 0.97, "item_f1": min(1.0, b / full)} for b in (4, 8, 12, 16, 24, 32, 48)
        ]
        for mode, full in (("single", 50.0), ("swarm", 12.5))
    }
    one = {"item_f1": 0.24, "critical_steps": 11.6, "total_steps": 11.6, "n": 64}
    many = {"item_f1": 0.96, "critical_steps": 8.1, "total_steps": 43.5, "n": 64}
    stages = {
        s: {"wall_s": 95.2, "tokens": 1_640_000, "loss_first": 7.2, "loss_last": 1.24, "what": w}
        for s, w in STAGES.items()
    }
    parl_curve = [
        {"iteration": i + 1, "accuracy": 0.3 + 0.6 * r, "parallelism": 1.2 + 8 * r**2, "reward": 0.4 + 0.5 * r,
         "critical_steps": 30 - 20 * r, "lambda_parallel": 0.3 * (1 - r), "lambda_finish": 0.2 * (1 - r)}
        for i, r in enumerate(ramp.tolist())
    ]  # fmt: skip
    content: dict[str, Any] = {
        "results.json": {
            "name": "nano", "command": "baltoro recipe configs/nano.toml", "wall_s": 843.2, "peak_rss_mb": 2910.0,
            "cores": 2, "threads": 2, "dtype": "bfloat16", "seed": 0, "commit": "a1b2c3d",
            "model": {"parameters": 2_310_000, "active": 1_240_000},
            "stages": stages,
            "vision": {task: {"accuracy": a, "chance": c, "n": 200} for task, (a, c) in TASKS.items()},
            "rl": {
                "curve": [
                    {"iteration": i + 1, "reward": 0.5 + 0.3 * r, "vision_reward": 0.6 + 0.2 * r,
                     "text_reward": 0.4 + 0.4 * r}
                    for i, r in enumerate(ramp.tolist())
                ],
                "reward_before": 0.5, "reward_after": 0.8,
            },
            "parl": {
                "curve": parl_curve, "parallelism_before": 1.2, "parallelism_after": 9.2, "reward_before": 0.3,
                "reward_after": 0.9,
            },
            "wide_search": {"entities": [8, 16], "budget": 12, "single": one, "swarm": many, "curve": curve},
            "real_documents": {
                "packages": 36, "fields": ["Version", "License", "Requires-Python"], "budget": 12,
                "single": one, "swarm": many,
            },
        },
        "metrics.jsonl": metrics,
        "live.jsonl": live,
        "examples.json": examples,
        "swarm.json": run_file(swarm(rng), 42 / 48),
        "single.json": run_file(single(rng), 0.5),
    }  # fmt: skip
    write(folder, content)
    return content


def write(folder: Path, content: dict[str, Any]) -> None:
    for name, value in content.items():
        lines = "".join(json.dumps(record) + "\n" for record in value) if name.endswith(".jsonl") else json.dumps(value)
        (folder / name).write_text(lines)


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text of each."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(" ".join(data.split()))

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    fake_run(folder)
    write_report(folder)
    return folder


def browser(page: Path, scratch: Path) -> str:
    """The document as Chromium has it after running whatever it would run."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    command = [str(CHROMIUM), *flags, "--no-first-run", f"--user-data-dir={scratch}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def test_one_well_formed_file_that_loads_nothing(folder: Path):
    page = Page(folder / "report.html")
    assert page.open == []
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for key in ("src", "href", "xlink:href", "srcset", "data"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"@import|url\((?!#)", (folder / "report.html").read_text())


def test_every_picture_and_figure_has_words(folder: Path):
    elements = Page(folder / "report.html").elements
    images = [attributes for tag, attributes in elements if tag == "img"]
    # 12 examples of which every fourth is a clip of 6 frames; one picture and one clip of 4 that a subagent read.
    assert len(images) == 9 + 3 * 6 + 1 + 4
    assert all(image["alt"].strip() for image in images)
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for tag, a in elements if tag == "svg")


def test_ids_are_unique_and_inner_links_lead_somewhere(folder: Path):
    page = Page(folder / "report.html")
    ids = [a["id"] for tag, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    text = (folder / "report.html").read_text()
    targets = [a[key][1:] for _, a in page.elements for key in ("href", "xlink:href") if a.get(key, "").startswith("#")]
    assert {*targets, *re.findall(r"url\(#([^)]+)\)", text)} <= set(ids)


def test_the_same_files_give_the_same_bytes(folder: Path):
    before = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == before
    assert {p.name for p in folder.iterdir()} == {
        "results.json", "metrics.jsonl", "live.jsonl", "examples.json", "swarm.json", "single.json", "report.html"
    }  # fmt: skip


def test_headlines_worked_by_hand(folder: Path):
    texts = Page(folder / "report.html").texts
    # Both reach 0.96: the single agent at a budget of 48 (48 / 50), the swarm at one of 12 (12 / 12.5).
    for expected in ("0.96", "0.24", "4.0×", "1.2 → 9.2", "75%"):
        assert expected in texts[:20]


def test_the_marked_path_is_the_critical_steps(folder: Path):
    run = swarm(np.random.default_rng(0))
    alone = single(np.random.default_rng(0))
    page = Page(folder / "report.html")
    # By hand: 1 + (1 + 4) + (1 + 3) + 1 model calls on the path; a single agent is all path.
    assert critical_steps(run) == 11
    assert critical_path(run) == (None, 3, 0, None)
    bars = [a for a in page.of_class("critical") if "x" in a]
    assert len(bars) == 11 + len(alone.turns)
    assert len([a for a in page.of_class("model") if "x" in a]) == 4 + 12 * 3 + 1 + len(alone.turns)
    marked = [page.texts[i - 1] for i, text in enumerate(page.texts) if text == "critical path"]
    assert marked == [f"subagent 4 · {NAMES[3]}", f"subagent 9 · {NAMES[8]}"]


def test_the_answer_cell_by_cell(folder: Path):
    page = Page(folder / "report.html")
    single_right, single_wrong = 8, 16
    # Of 24 cells one value is wrong and two are missing; one more was not asked for. The name in capitals counts.
    assert len([c for t, c in page.elements if t == "td" and c.get("class") == "right"]) == 21 + single_right
    assert len([c for t, c in page.elements if t == "td" and c.get("class") == "wrong"]) == 3 + 1 + single_wrong


def strings(value: Any) -> Iterator[str]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        yield from strings(item) if isinstance(item, (dict, list)) else [item] if isinstance(item, str) else []


NAMING = {"stages", "vision", "gold"}


def poisoned(value: Any, key: str = "") -> Any:
    """Every text replaced, and every key that a run may choose; what the format fixes is kept."""
    if isinstance(value, dict):
        return {PAYLOAD + k if key in NAMING else k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(item, key) for item in value]
    return PAYLOAD + value if isinstance(value, str) and (key, value) != ("type", value) else value


def hostile_run(folder: Path) -> dict[str, Any]:
    content = {name: poisoned(value) for name, value in fake_run(folder).items()}
    for name in ("swarm.json", "single.json"):
        task = content[name]["task"]
        task["gold"] = {
            row: {PAYLOAD + column: value for column, value in cells.items()} for row, cells in task["gold"].items()
        }
        pictures = content[name]["media"]
        content[name]["media"] = {PAYLOAD + key: frames for key, frames in pictures.items()}
    write(folder, content)
    return content


def test_no_text_becomes_markup(tmp_path: Path, folder: Path):
    content = hostile_run(tmp_path)
    page, clean = Page(write_report(tmp_path)), Page(folder / "report.html")
    assert page.open == []
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements}
    shown = "\n".join(page.texts)
    for text in {PAYLOAD + name for name in ("nano", "a1b2c3d", "colour", "vit", "what colour is the cross?", *NAMES)}:
        assert " ".join(text.split()) in shown
    assert PAYLOAD in next(iter(strings(content["swarm.json"]["trace"])))


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium")
@pytest.mark.parametrize("policy", [True, False])
def test_nothing_runs_in_a_browser(tmp_path: Path, policy: bool):
    hostile_run(tmp_path)
    page = write_report(tmp_path)
    if not policy:  # the escaping must hold by itself
        text = page.read_text(encoding="utf-8")
        bare = re.sub(r"<meta http-equiv[^>]*>", "", text)
        assert bare != text
        page.write_text(bare, encoding="utf-8")
    dom = browser(page, tmp_path / "profile")
    assert len(re.findall(r"<script\b", re.sub(r'"[^"]*"', "", dom))) == 1
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    assert title[1].startswith("Baltoro")
    assert '<img src="x"' not in dom


def test_pictures_that_are_not_inline_png_are_not_shown(tmp_path: Path):
    content = fake_run(tmp_path)
    bad = [
        "https://example.org/a.png",
        "javascript:alert(1)",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AA",
    ]
    for example, uri in zip(content["examples.json"], bad, strict=False):
        example["media"] = [uri]
    write(tmp_path, content)
    page = Page(write_report(tmp_path))
    assert page.texts.count("[picture not kept]") == 4
    assert not [uri for uri in bad if uri in (tmp_path / "report.html").read_text()]


def test_an_empty_folder_names_what_is_missing(tmp_path: Path):
    texts = Page(write_report(tmp_path)).texts
    for name in (
        "stages",
        "metrics.jsonl",
        "live.jsonl",
        "vision",
        "examples.json",
        "rl",
        "parl",
        "wide_search",
        "swarm.json",
    ):
        assert name in texts


def test_a_run_that_was_killed_shows_what_it_has(tmp_path: Path):
    content = fake_run(tmp_path)
    for name in ("examples.json", "single.json"):
        (tmp_path / name).unlink()
    results = content["results.json"]
    for key in ("real_documents", "parl", "peak_rss_mb", "model"):
        del results[key]
    del results["wide_search"]["curve"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    page = Page(write_report(tmp_path))
    for name in ("examples.json", "real_documents", "parl", "curve"):
        assert name in page.texts
    assert len(page.of_class("figure")) == len(STAGES) + 1
    assert page.of_class("timeline")


def test_smoothing_keeps_straight_lines_and_passes_gaps_over():
    assert smooth([1.0, 3.0, 5.0, 7.0, 9.0], 2) == pytest.approx([1.0, 3.0, 5.0, 7.0, 9.0])
    assert smooth([0.0, 6.0, 0.0, 3.0], 1) == pytest.approx([0.0, 2.0, 3.0, 3.0])
    assert smooth([2.0, float("nan"), 4.0, float("inf"), 4.0], 1) == pytest.approx([2.0, 3.0, 4.0, 4.0, 4.0])


if __name__ == "__main__":  # a report to look at
    target = Path(tempfile.mkdtemp())
    fake_run(target)
    print(write_report(target))
