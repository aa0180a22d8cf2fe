"""A wide-search task solved by scripted agents: item-F1 and critical steps counted by hand, budgets, failures."""

import re

import pytest

from baltoro.agent.engine import Completion, Sampling
from baltoro.agent.scripted import Script, ScriptedEngine, completion_text
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.swarm.critical import critical_steps, total_steps
from baltoro.swarm.demonstrations import NOTICE
from baltoro.swarm.wide import Library, Mode, WideRules, solve
from baltoro.world.document import Document
from baltoro.world.tasks import WideSearch

NAMES = ("Ada Frostby", "Bo Larkwood", "Cy Mosston", "Di Thornlow")
GOLD = {name: {"metal": f"m{i}", "age": f"{20 + i}"} for i, name in enumerate(NAMES)}
TASK = WideSearch(NAMES, ("metal", "age"), GOLD)
PAGES = [
    Document(str(7 + i), name, (f"{name}\n|age={20 + i}\n|river=r{i}\n|metal=m{i}",)) for i, name in enumerate(NAMES)
]
RULES = WideRules(max_context_tokens=100_000, max_turn_tokens=10_000, subagent_turn_tokens=1000)
ROWS = {name: f"{name}|metal=m{i}|age={20 + i}" for i, name in enumerate(NAMES)}
Call = tuple[str, dict[str, object]]


def turn(prompt: str) -> int:
    return prompt.count("<|im_assistant|>") - 1


def returns(prompt: str) -> list[str]:
    return re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", prompt, re.DOTALL)


def told(prompt: str) -> bool:
    return f"<|im_user|>user<|im_middle|>{NOTICE}<|im_end|>" in prompt


def search(name: str) -> str:
    return completion_text(calls=[("search", {"query": name})])


def open_page(name: str) -> str:
    return completion_text(calls=[("open", {"url": str(7 + NAMES.index(name))})])


def noted(pages: list[str]) -> str:
    """A row for each page that was opened."""
    facts = [(page.split("\n")[0], dict(line[1:].split("=") for line in page.split("\n")[1:])) for page in pages]
    return "\n".join(f"{name}|age={fact['age']}|metal={fact['metal']}" for name, fact in facts)


def alone(prompt: str, role: str) -> str:
    """Searches and opens one name after another; answers when it has all or when it is told to."""
    opened = [text for text in returns(prompt) if "\n|" in text]
    if told(prompt) or len(opened) == len(NAMES):
        return completion_text(noted(opened))
    step = turn(prompt)
    return search(NAMES[step // 2]) if step % 2 == 0 else open_page(NAMES[step // 2])


def reader(prompt: str, role: str) -> str:
    """A subagent: search, open, answer."""
    name = prompt.split("<|im_user|>user<|im_middle|>")[1].split("<|im_end|>")[0]
    return (search(name), open_page(name), completion_text(noted(returns(prompt)[1:])))[turn(prompt)]


def lead(*stages: tuple[str, ...], first: str = "") -> Script:
    """Creates the reader (and, where `first` is given, assigns it in the same turn), then a stage a turn; in the end
    it answers with all that came back."""
    create: Call = ("create_subagent", {"name": "reader", "system_prompt": "Find name|metal|age"})

    def assign(name: str) -> Call:
        return "assign_task", {"agent": "reader", "prompt": name}

    turns = [[create, *([assign(first)] if first else [])], *[[assign(name) for name in stage] for stage in stages]]

    def script(prompt: str, role: str) -> str:
        if turn(prompt) < len(turns) and not told(prompt):
            return completion_text(calls=turns[turn(prompt)])
        return completion_text("\n".join(text for text in returns(prompt) if "|" in text))

    return script


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(PAGES)


class Solver:
    def __init__(self, tokenizer: Tokenizer, media_spec: MediaSpec, library: Library) -> None:
        self.tokenizer, self.media_spec, self.library = tokenizer, media_spec, library

    async def __call__(
        self, mode: Mode, main: Script, budget: int | None = None, child: Script = reader, rules: WideRules = RULES
    ) -> Trace:
        engine = ScriptedEngine(
            self.tokenizer, lambda prompt, role: (child if role == "subagent" else main)(prompt, role)
        )
        return await solve(
            engine,
            self.tokenizer,
            self.media_spec,
            TASK,
            self.library,
            mode=mode,
            critical_steps=budget,
            sampling=Sampling(max_tokens=1),
            rules=rules,
            role="agent",
        )


@pytest.fixture
def solver(tokenizer: Tokenizer, media_spec: MediaSpec, library: Library) -> Solver:
    return Solver(tokenizer, media_spec, library)


@pytest.mark.parametrize(
    ("script", "critical", "total", "parallel"),
    [
        # create 1, one stage 1 + 3 (the four subagents run side by side), answer 1; subagents take 3 steps each.
        (lead(NAMES), 1 + 4 + 1, 3 + 4 * 3, 1 - 1 / 4),
        (lead(NAMES[:2], NAMES[2:]), 1 + 2 * 4 + 1, 4 + 4 * 3, 1 - 2 / 4),
        (lead(*[(name,) for name in NAMES]), 1 + 4 * 4 + 1, 6 + 4 * 3, 0),
        # The first assigned in the turn that creates.
        (lead(NAMES[1:], first=NAMES[0]), 4 + 4 + 1, 3 + 4 * 3, 1 - 2 / 4),
    ],
)
async def test_a_perfect_orchestrator(
    solver: Solver, script: Script, critical: int, total: int, parallel: float
) -> None:
    for budget in (None, critical):  # exactly its cost is enough
        trace = await solver("swarm", script, budget)
        assert trace.final_text == "\n".join(f"{n}|age={GOLD[n]['age']}|metal={GOLD[n]['metal']}" for n in NAMES)
        assert trace.signals["perf"] == 1
        assert trace.signals["parallel"] == pytest.approx(parallel)
        assert (critical_steps(trace), total_steps(trace)) == (critical, total)
        assert (trace.role, trace.trainable) == ("orchestrator", True)
        assert {(child.role, child.trainable) for child in trace.children} == {("subagent", False)}
        assert all(child.messages[0].text == "Find name|metal|age" for child in trace.children)


async def test_a_perfect_single_agent(solver: Solver) -> None:
    trace = await solver("single", alone)
    assert (trace.status, trace.signals["perf"]) == ("completed", 1)
    assert critical_steps(trace) == total_steps(trace) == 2 * 4 + 1
    assert (trace.role, trace.children) == ("agent", ())
    assert not told(solver.tokenizer.decode(trace.tokens))


@pytest.mark.parametrize("budget", range(2, 9))
async def test_a_single_agent_under_a_budget_stops_with_the_notice(solver: Solver, budget: int) -> None:
    """One step is left for the answer; of the others every second one opens a page. k pages are k rows of 4:
    F1 = 2 * 2k / (2k + 8)."""
    trace = await solver("single", alone, budget)
    k = (budget - 1) // 2
    assert trace.status == "limit"
    assert critical_steps(trace) == len(trace.turns) == budget
    assert trace.messages[-2].text == NOTICE
    assert [message.text for message in trace.messages].count(NOTICE) == 1
    assert len(trace.final_text.splitlines()) == k
    assert trace.signals["perf"] == pytest.approx(2 * 2 * k / (2 * k + 8))


async def test_an_agent_that_ignores_the_notice_has_no_answer(solver: Solver) -> None:
    trace = await solver("single", lambda prompt, role: search(NAMES[0]), 3)
    assert (trace.status, trace.signals["perf"], critical_steps(trace)) == ("limit", 0, 3)


async def test_a_swarm_under_a_budget_stops_with_the_notice(solver: Solver) -> None:
    # create 1, a stage of two 4, notice, answer 1: two of four rows, F1 = 2 * 4 / (4 + 8).
    trace = await solver("swarm", lead(NAMES[:2], NAMES[2:]), 6)
    assert trace.messages[-2].text == NOTICE
    assert critical_steps(trace) == 6
    assert trace.signals["perf"] == pytest.approx(2 * 4 / (4 + 8))


async def test_subagents_get_the_steps_that_are_left_but_one(solver: Solver) -> None:
    # Behind create and assign 2 of 4 steps are left: one for the subagents, who only come to search, one to answer.
    trace = await solver("swarm", lead(NAMES), 4)
    assert [len(child.turns) for child in trace.children] == [1, 1, 1, 1]
    assert (critical_steps(trace), trace.signals["perf"], trace.signals["finish"]) == (4, 0, 0)


async def test_subagents_keep_their_own_bound(solver: Solver) -> None:
    rules = WideRules(100_000, 10_000, subagent_turns=2, subagent_turn_tokens=1000)
    trace = await solver("swarm", lead(NAMES), 100, rules=rules)
    assert [child.status for child in trace.children] == ["limit"] * 4
    assert critical_steps(trace) == 1 + (1 + 2) + 1


async def test_wrong_cells_count_against_the_answer(solver: Solver) -> None:
    # 3 of 8 cells right, 4 given: F1 = 2 * 3 / (4 + 8).
    answer = f"{ROWS[NAMES[0]]}\n{NAMES[1]}|metal=M1|age=99\nnobody was sure of the rest"
    trace = await solver("single", lambda prompt, role: completion_text(answer))
    assert trace.signals["perf"] == pytest.approx(2 * 3 / (4 + 8))


async def test_a_failure_scores_nothing(solver: Solver) -> None:
    class Lost:
        async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
            raise ConnectionError("gone")

    modes: tuple[Mode, ...] = ("single", "swarm")
    for mode in modes:
        trace = await solve(
            Lost(),
            solver.tokenizer,
            solver.media_spec,
            TASK,
            solver.library,
            mode=mode,
            critical_steps=None,
            sampling=Sampling(max_tokens=1),
            rules=RULES,
            role="helper",
        )
        assert (trace.status, trace.signals["perf"]) == ("failed", 0)
        assert trace.role == {"single": "helper", "swarm": "orchestrator"}[mode]
    small = WideRules(max_context_tokens=700, max_turn_tokens=400)
    trace = await solver("single", alone, rules=small)
    assert (trace.status, trace.signals["perf"]) == ("overflow", 0)


async def test_both_modes_have_the_same_pages_and_search_tools(solver: Solver) -> None:
    """A search shows two hits, best first; both the single agent and the orchestrator may search and open."""
    modes: tuple[Mode, ...] = ("single", "swarm")
    seen: list[list[str]] = []
    for mode in modes:
        calls: list[Call] = [("search", {"query": "Cy Mosston"}), ("open", {"url": "9"})]
        words = [completion_text(calls=calls), completion_text("")]
        trace = await solver(mode, lambda prompt, role, words=words: words[turn(prompt)])
        seen.append([result.text for result in trace.turns[0].results])
    assert seen[0] == seen[1] == ["Cy Mosston 9", PAGES[2].text]
    trace = await solver(
        "single", lambda prompt, role: search("Ada Bo Cy") if turn(prompt) == 0 else completion_text("")
    )
    assert len(trace.turns[0].results[0].text.split("\n")) == 2


async def test_a_single_agent_has_no_swarm(solver: Solver) -> None:
    trace = await solver("single", lead(NAMES))
    assert not trace.children
    assert trace.turns[0].results[0].text == 'error: there is no tool "create_subagent"'
