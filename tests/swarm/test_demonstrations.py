"""Demonstrations have exactly the shape of rollouts: the expert's words, played through the real loop, tools and
orchestrator, give the same tokens and the same loss mask as rendering the demonstration."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from baltoro.agent.engine import Sampling
from baltoro.agent.loop import Limits, run_agent
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Image, Message
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.score.table import item_f1, parse_table
from baltoro.swarm.demonstrations import NOTICE, SUBAGENT, SWARM_PROMPT, Demonstrator
from baltoro.swarm.wide import Library, Mode, WideRules, solve
from baltoro.tools.python import Python, Sandbox, SandboxUnavailable
from baltoro.world.entities import World
from baltoro.world.scenes import COLOURS
from baltoro.world.tasks import WideSearch

RULES = WideRules(max_context_tokens=200_000, max_turn_tokens=20_000, subagent_turn_tokens=1000)
SERIAL, FOURS, ALL = ((1, 1.0),), ((4, 1.0),), ((0, 1.0),)
PARALLEL_WORDS = re.compile(
    r"parallel|concurren|simultan|at once|at the same time|split|divide|together|batch|delegate|cohort|many|multiple",
    re.IGNORECASE,
)
Call = tuple[str, dict[str, object]]
Draw = Callable[[Demonstrator, random.Random], list[Message]]
DRAWS: dict[str, Draw] = {
    "subagent": lambda d, rng: d.subagent(rng),
    "single": lambda d, rng: d.single(rng, 1, 6),
    "orchestrator": lambda d, rng: d.orchestrator(rng, 2, 9, ((1, 0.4), (2, 0.2), (0, 0.4))),
    "pixels": lambda d, rng: d.pixels(rng),
}


@pytest.fixture(scope="module")
def experts() -> list[Demonstrator]:
    return [Demonstrator(World(seed, "train")) for seed in range(5)]


def drawn(experts: list[Demonstrator], kind: str, n: int) -> list[list[Message]]:
    return [DRAWS[kind](experts[seed % len(experts)], random.Random(seed)) for seed in range(n)]


def spoken(messages: Sequence[Message]) -> list[str]:
    """What the model writes in each of its turns, control tokens by name."""
    texts: list[str] = []
    for message in messages:
        if message.role == "assistant":
            calls = "".join(
                f"<|tool_call_begin|>{call.id}<|tool_call_argument_begin|>{call.arguments}<|tool_call_end|>"
                for call in message.tool_calls
            )
            section = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>" if calls else ""
            texts.append(f"{message.reasoning}</think>{message.text}{section}")
    return texts


def turn(prompt: str) -> int:
    return prompt.count("<|im_assistant|>") - 1


def returns(prompt: str) -> list[str]:
    return re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", prompt, re.DOTALL)


def reads_its_page(prompt: str) -> str:
    """A subagent that works from what it sees alone: the row to fill in, the name, the hits, the page."""
    instruction, name = (part.split("<|im_end|>")[0] for part in prompt.split("<|im_middle|>")[1:3])
    columns, name = instruction.removeprefix("Fill in name|").split("|"), name.split("|")[0]
    found = returns(prompt)
    if not found:
        return completion_text(calls=[("search", {"query": name[1:]})])
    if len(found) == 1:
        [url] = [line for line in found[0].split("\n") if line == name[1:]]
        return completion_text(calls=[("open", {"url": url})])
    facts = dict(line.removeprefix("|").split("=", 1) for line in found[1].split("\n")[1:])
    return completion_text("|".join([name, *(f"{column}={facts[column]}" for column in columns)]))


def asked(messages: Sequence[Message], world: World) -> WideSearch:
    """The task that the demonstration's user states, with gold answers from the world."""
    head, *lines = messages[1].text.split("\n")
    names = [line[1:].split("|")[0] for line in lines]  # between a label and a count
    columns = tuple(head.removeprefix("Find name|").split("|"))
    facts = {entity.name: entity.attributes for kind in world.kinds for entity in kind.entities}
    return WideSearch(tuple(names), columns, {name: {c: facts[name][c] for c in columns} for name in names})


def assert_same_tokens(trace: Trace, messages: list[Message], tokenizer: Tokenizer, media_spec: MediaSpec) -> None:
    shown = render(messages, tokenizer, media_spec)
    assert tokenizer.decode(trace.tokens) == tokenizer.decode(shown.ids)
    assert list(trace.tokens) == shown.ids
    assert list(trace.loss_mask) == shown.loss_mask
    assert not trace.media
    assert not shown.media


async def replayed(
    expert: Demonstrator, messages: list[Message], tokenizer: Tokenizer, media_spec: MediaSpec, mode: Mode
) -> Trace:
    """The demonstration's task, solved as evaluation and RL solve it, by the demonstration's words; subagents fail
    where they do there."""
    words = spoken(messages)
    ended = {message.tool_call_id: message.text for message in messages if message.role == "tool"}
    calls = [call for message in messages for call in message.tool_calls if call.name == "assign_task"]
    fates = {json.loads(call.arguments)["prompt"]: ended[call.id] for call in calls}

    def script(prompt: str, role: str) -> str:
        if role != "subagent":
            return words[turn(prompt)]
        fate = fates[prompt.split("<|im_middle|>")[2].split("<|im_end|>")[0]]
        if fate == "not found":
            return completion_text(fate)
        return completion_text("and on " * 2000) if fate.startswith("error: ") else reads_its_page(prompt)

    told = any(message.role == "user" and message.text == NOTICE for message in messages)
    stages = [sum(call.name == "assign_task" for call in message.tool_calls) for message in messages]
    # A subagent searches, opens and answers: 3 steps, during which the orchestrator waits.
    steps = len(words) + 3 * sum(width > 0 for width in stages)
    return await solve(
        ScriptedEngine(tokenizer, script),
        tokenizer,
        media_spec,
        asked(messages, expert.world),
        Library(expert.world.documents),
        mode=mode,
        critical_steps=steps if told else None,
        sampling=Sampling(max_tokens=1),
        rules=RULES,
        role="agent",
    )


async def test_single_replays_token_for_token(
    experts: list[Demonstrator], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    statuses: list[str] = []
    for seed in range(24):
        expert = experts[seed % len(experts)]
        messages = expert.single(random.Random(seed), 1, 5)
        trace = await replayed(expert, messages, tokenizer, media_spec, "single")
        assert_same_tokens(trace, messages, tokenizer, media_spec)
        statuses.append(trace.status)
        if trace.status == "completed":
            assert trace.signals["perf"] == 1
    assert set(statuses) == {"completed", "limit"}


@pytest.mark.parametrize("widths", [SERIAL, FOURS, ALL])
async def test_orchestrator_replays_token_for_token(
    experts: list[Demonstrator], tokenizer: Tokenizer, media_spec: MediaSpec, widths: tuple[tuple[int, float], ...]
) -> None:
    statuses: list[str] = []
    for seed in range(24):
        expert = experts[seed % len(experts)]
        messages = expert.orchestrator(random.Random(seed), 2, 9, widths)
        trace = await replayed(expert, messages, tokenizer, media_spec, "swarm")
        assert_same_tokens(trace, messages, tokenizer, media_spec)
        statuses.append(trace.status)
        if trace.status == "completed":
            assert trace.signals["perf"] == 1
    # It is told to answer between two cohorts, so never where there is one.
    assert set(statuses) == ({"completed"} if widths == ALL else {"completed", "limit"})


async def test_where_a_subagent_fails_its_row_alone_stays_empty(
    experts: list[Demonstrator], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    failed = rows = 0
    for seed in range(24):
        expert = experts[seed % len(experts)]
        messages = expert.orchestrator(random.Random(seed), 2, 9, ((4, 0.5), (0, 0.5)), 0.3)
        assert_same_tokens(
            await replayed(expert, messages, tokenizer, media_spec, "swarm"), messages, tokenizer, media_spec
        )
        task = asked(messages, expert.world)
        table = parse_table(messages[-1].text, task.columns)
        empty = [name for name, cells in table.items() if not cells]
        assert {name: task.gold[name] for name in table if name not in empty} == {
            name: cells for name, cells in table.items() if cells
        }
        assert len(empty) == sum("not found" in m.text or "error" in m.text for m in messages if m.role == "tool")
        failed, rows = failed + len(empty), rows + len(table)
    assert 0.2 < failed / rows < 0.4


@pytest.mark.parametrize("width", [1, 4])
def test_only_the_end_of_the_task_makes_a_cohort_smaller(experts: list[Demonstrator], width: int) -> None:
    """Whether one more call follows in a turn is never a matter of chance."""
    cut = 0
    for seed in range(60):
        messages = experts[seed % len(experts)].orchestrator(random.Random(seed), 2, 9, ((width, 1.0),))
        names = messages[1].text.split("\n")[1:]
        sizes = [sum(call.name == "assign_task" for call in message.tool_calls) for message in messages]
        *full, last = [size for size in sizes if size]
        assert set(full) <= {width}
        assert last == width or sum(full) + last == len(names)
        cut += sum(full) + last < len(names)
    assert cut


async def test_subagent_replays_token_for_token_below_a_real_orchestrator(
    experts: list[Demonstrator], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    finals: list[str] = []
    statuses: list[str] = []
    for seed in range(100):
        expert = experts[seed % len(experts)]
        messages = expert.subagent(random.Random(seed))
        create: Call = ("create_subagent", {"name": SUBAGENT, "system_prompt": messages[0].text})
        assign: Call = ("assign_task", {"agent": SUBAGENT, "prompt": messages[1].text})
        turns = {"orchestrator": [completion_text(calls=[create, assign]), completion_text("done")]}
        turns["subagent"] = spoken(messages)
        told = messages[-2].text == NOTICE
        trace = await solve(
            ScriptedEngine(tokenizer, lambda prompt, role, turns=turns: turns[role][turn(prompt)]),
            tokenizer,
            media_spec,
            WideSearch((), (), {}),
            Library(expert.world.documents),
            mode="swarm",
            critical_steps=None,
            sampling=Sampling(max_tokens=1),
            # Where its last turn is announced, it has no turn to spare.
            rules=replace(RULES, subagent_turns=len(turns["subagent"])) if told else RULES,
            role="orchestrator",
        )
        [child] = trace.children
        assert_same_tokens(child, messages, tokenizer, media_spec)
        assert trace.turns[0].results[1].text == child.final_text == messages[-1].text
        assert child.status == ("limit" if told else "completed")
        statuses.append(child.status)
        finals.append(child.final_text)
    assert set(statuses) == {"completed", "limit"}
    assert 0 < finals.count("not found") < 10


def test_a_subagent_is_asked_as_an_orchestrator_asks(experts: list[Demonstrator]) -> None:
    """The instruction has the same form in both, a row with its values left out, and the task is a line of the list."""
    form = re.compile(r"Fill in name(\|[\w-]+){2,3}")
    for messages in drawn(experts, "subagent", 20):
        assert form.fullmatch(messages[0].text)
        assert re.fullmatch(r"[①-⑯][^|\n]+\|\d+", messages[1].text)
    for messages in drawn(experts, "orchestrator", 20):
        create, *_ = messages[2].tool_calls
        asked_for, *lines = messages[1].text.split("\n")
        instruction = asked_for.replace("Find", "Fill in")
        assert create.arguments == f'{{"name":"{SUBAGENT}","system_prompt":"{instruction}"}}'
        assigned = [call for message in messages for call in message.tool_calls if call.name == "assign_task"]
        assert [call.arguments for call in assigned] == [
            f'{{"agent":"{SUBAGENT}","prompt":"{line}"}}' for line in lines[: len(assigned)]
        ]


@pytest.mark.parametrize("kind", DRAWS)
def test_calls_are_numbered_through_the_dialogue_and_written_as_compact_json(
    experts: list[Demonstrator], kind: str
) -> None:
    for messages in drawn(experts, kind, 30):
        calls = [call for message in messages for call in message.tool_calls]
        assert [call.id for call in calls] == [f"functions.{call.name}:{i}" for i, call in enumerate(calls)]
        assert [m.tool_call_id for m in messages if m.role == "tool"] == [call.id for call in calls]
        for call in calls:
            assert call.arguments == json.dumps(json.loads(call.arguments), ensure_ascii=False, separators=(",", ":"))


async def test_pixels_replays_token_for_token_in_the_sandbox(
    experts: list[Demonstrator], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    sandbox = Sandbox(processes=1, timeout_s=60)
    try:
        await sandbox.run("")
    except SandboxUnavailable as error:
        pytest.skip(f"this kernel does not allow the confinement: {error}")
    for seed in range(4):
        messages = experts[0].pixels(random.Random(seed))
        left, top, right, bottom = map(int, messages[-1].text.split())
        [colour] = [name for name in COLOURS if name in messages[1].text.split()]
        down, across = ((1, 3), (3, 1))[seed % 2]  # pixels to a 32nd; the right and lower edges lie behind the last
        pixels = np.zeros((32 * down, 32 * across, 3), np.uint8)
        pixels[down * top : down * bottom, across * left : across * right] = COLOURS[colour]
        trace = await run_agent(
            ScriptedEngine(tokenizer, spoken(messages)),
            tokenizer,
            media_spec,
            role="agent",
            messages=messages[:2],
            tools=[Python(sandbox, Image(pixels))],
            limits=Limits(max_turns=3, max_context_tokens=20_000, max_turn_tokens=2000),
            sampling=Sampling(max_tokens=1),
            declare_tools=False,
        )
        assert_same_tokens(trace, messages, tokenizer, media_spec)


@pytest.mark.parametrize("kind", DRAWS)
def test_no_demonstration_contains_media(
    experts: list[Demonstrator], tokenizer: Tokenizer, media_spec: MediaSpec, kind: str
) -> None:
    for messages in drawn(experts, kind, 60):
        assert all(isinstance(part, str) for message in messages for part in message.content)
        shown = render(messages, tokenizer, media_spec)
        assert tokenizer.media_pad not in shown.ids
        assert tokenizer.media_begin not in shown.ids


@pytest.mark.parametrize("kind", DRAWS)
def test_nothing_tells_an_agent_to_work_in_parallel(experts: list[Demonstrator], kind: str) -> None:
    for messages in drawn(experts, kind, 60):
        told = [message.text.split("\n")[0] for message in messages if message.role in ("system", "user")]
        told += [c.arguments for m in messages for c in m.tool_calls if c.name == "create_subagent"]
        assert not [text for text in told if PARALLEL_WORDS.search(text)]


async def test_nothing_in_a_rollout_tells_the_orchestrator_either(
    experts: list[Demonstrator], tokenizer: Tokenizer, media_spec: MediaSpec
) -> None:
    """Not even the tools' descriptions: they are not declared (the report's text for assign_task does say so)."""
    messages = experts[0].orchestrator(random.Random(0), 3, 3, SERIAL)
    trace = await replayed(experts[0], messages, tokenizer, media_spec, "swarm")
    prompt = tokenizer.decode(trace.tokens[: trace.turns[0].prompt_len])
    assert prompt == (
        f"<|im_system|>system<|im_middle|>{SWARM_PROMPT}<|im_end|>"
        f"<|im_user|>user<|im_middle|>{messages[1].text}<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    )
    assert not PARALLEL_WORDS.search(SWARM_PROMPT)


@pytest.mark.parametrize("kind", ["subagent", "single", "orchestrator"])
def test_an_answer_holds_what_was_seen_and_nothing_else(experts: list[Demonstrator], kind: str) -> None:
    for seed, messages in enumerate(drawn(experts, kind, 60)):
        world = experts[seed % len(experts)].world
        final = messages[-1].text
        if final == "not found":
            assert messages[1].text[1:].split("|")[0] not in {document.title for document in world.documents}
            continue
        columns = messages[0 if kind == "subagent" else 1].text.split("\n")[0].split("|")[1:]
        assert columns
        facts = {entity.name: entity.attributes for k in world.kinds for entity in k.entities}
        seen = [m.text for m in messages if m.role == "tool"]
        rows = parse_table(final, columns)
        assert len(rows) == sum("|" in line for line in final.splitlines())
        for name, cells in rows.items():
            assert cells == {column: facts[name][column] for column in columns}
            assert any(name in text and all(cell in text for cell in cells.values()) for text in seen), (
                "an answer without its page"
            )


@pytest.mark.parametrize("kind", ["subagent", "single"])
def test_only_pages_that_the_search_found_are_opened(experts: list[Demonstrator], kind: str) -> None:
    opened = 0
    for messages in drawn(experts, kind, 60):
        for before, message in pairwise(messages):
            for call in message.tool_calls:
                if call.name == "open":
                    url = call.arguments.removeprefix('{"url":"').removesuffix('"}')
                    assert url in before.text.split("\n")
                    opened += 1
    assert opened > 50


def test_told_to_answer_a_single_agent_gives_the_rows_it_has(experts: list[Demonstrator]) -> None:
    """Each opened page is worth its row: item-F1 2k / (k + n) after k of n pages."""
    cut: set[bool] = set()
    for seed, messages in enumerate(drawn(experts, "single", 80)):
        task = asked(messages, experts[seed % len(experts)].world)
        opened = sum(call.name == "open" for message in messages for call in message.tool_calls)
        n = len(task.names)
        told = messages[-2].text == NOTICE
        assert told or opened == n
        assert item_f1(parse_table(messages[-1].text, task.columns), task.gold) == pytest.approx(
            2 * opened / (opened + n)
        )
        cut.add(told)
    assert cut == {True, False}


@pytest.mark.parametrize(("widths", "expected"), [(SERIAL, 1), (FOURS, 4), (ALL, 9)])
def test_cohorts_are_as_wide_as_drawn(
    experts: list[Demonstrator], widths: tuple[tuple[int, float], ...], expected: int
) -> None:
    for seed in range(20):
        messages = experts[0].orchestrator(random.Random(seed), 9, 9, widths)
        stages = [
            sum(call.name == "assign_task" for call in message.tool_calls) for message in messages if message.tool_calls
        ]
        *full, last = stages
        assert all(width == expected for width in full)
        assert 1 <= last <= expected
        assert messages[-2].text == NOTICE or sum(stages) == 9


def test_widths_are_drawn_by_their_weights(experts: list[Demonstrator]) -> None:
    widths = ((1, 0.7), (3, 0.1), (0, 0.2))
    first = [len(experts[0].orchestrator(random.Random(seed), 6, 6, widths)[2].tool_calls) - 1 for seed in range(1000)]
    # A cohort is narrower where the agent is told to answer early: a fifth of the time, 1 to 6 of 6 names.
    serial = 0.7 + 0.3 * 0.2 / 6
    assert abs(first.count(1) / 1000 - serial) < 0.06  # 4 standard deviations
    assert abs(first.count(3) / 1000 - (0.1 * (0.8 + 0.2 * 4 / 6) + 0.2 * 0.2 / 6)) < 0.04


@pytest.mark.parametrize("kind", DRAWS)
def test_a_demonstration_follows_from_its_generator(kind: str) -> None:
    one, two = Demonstrator(World(3, "train")), Demonstrator(World(3, "train"))
    for seed in range(5):
        a, b = DRAWS[kind](one, random.Random(seed)), DRAWS[kind](two, random.Random(seed))
        assert spoken(a) == spoken(b)
        assert [message.content for message in a] == [message.content for message in b]
