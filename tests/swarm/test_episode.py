"""Whole episodes with a scripted model: isolation, budgets, faults, width, and independence of scheduling."""

import asyncio
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baltoro.agent.chaos import Chaos, ChaosEngine
from baltoro.agent.engine import Completion, Engine, Sampling
from baltoro.agent.loop import Limits
from baltoro.agent.scripted import Script, ScriptedEngine, completion_text
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.env import World, alone
from baltoro.rollout.judge import Policy
from baltoro.swarm.critical import critical_steps
from baltoro.swarm.episode import run_swarm
from baltoro.tools.search import Search, SearchIndex
from baltoro.world.document import Document

PAGES = [Document(f"w/{i}", f"item{i}", (f"item{i} costs {i * i}",)) for i in range(20)]
Call = tuple[str, dict[str, object]]


def create(name: str, prompt: str = "find the price") -> Call:
    return "create_subagent", {"name": name, "system_prompt": prompt}


def assign(agent: str, prompt: str) -> Call:
    return "assign_task", {"agent": agent, "prompt": prompt}


def search(query: str) -> Call:
    return "search", {"query": query}


def says(text: str = "", *calls: Call) -> str:
    return completion_text(text, calls=calls)


def returns(prompt: str) -> list[str]:
    """The tool results in a prompt."""
    return re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", prompt, re.DOTALL)


def turn(prompt: str) -> int:
    """How many turns the model has taken before this prompt."""
    return prompt.count("<|im_assistant|>") - 1


def looks_up(prompt: str, role: str) -> str:
    """A subagent that searches once and answers with the first hit."""
    found = returns(prompt)
    task = prompt.split("<|im_user|>user<|im_middle|>")[1].split("<|im_end|>")[0]
    return says("", search(task)) if not found else says(f"{task} is {found[0].split()[1]}")


class Swarm:
    def __init__(self, tokenizer: Tokenizer, media_spec: MediaSpec) -> None:
        self.tokenizer = tokenizer
        self.media_spec = media_spec
        self.index = SearchIndex.build(PAGES)
        self.search = Search(self.index)

    def engine(self, orchestrator: Script, subagent: Script = looks_up) -> ScriptedEngine:
        scripts = {"orchestrator": orchestrator, "subagent": subagent}
        return ScriptedEngine(self.tokenizer, lambda prompt, role: scripts[role](prompt, role))

    async def run(self, engine: Engine, **more: Any) -> Trace:
        given: dict[str, Any] = {
            "orchestrator_limits": Limits(10, 100_000, 50_000, notice="answer now"),
            "subagent_limits": Limits(5, 4000, 400, notice="answer now"),
            "sampling": Sampling(max_tokens=1, seed=3),
            **more,
        }
        return await run_swarm(
            engine,
            self.tokenizer,
            self.media_spec,
            task_prompt=("the prices",),
            system_prompt="you lead",
            orchestrator_tools=[self.search],
            subagent_tools=[self.search],
            declare_tools=True,
            **given,
        )


@pytest.fixture
def swarm(tokenizer: Tokenizer, media_spec: MediaSpec) -> Swarm:
    return Swarm(tokenizer, media_spec)


def lead(*turns: str) -> Script:
    return lambda prompt, role: turns[turn(prompt)]


def fan_out(count: int) -> Script:
    tasks = [assign("w", f"item{i % 20}") for i in range(count)]
    return lambda prompt, role: says("", create("w"), *tasks) if turn(prompt) == 0 else says(" ".join(returns(prompt)))


async def test_create_and_assign_in_one_turn_whatever_their_order(swarm: Swarm) -> None:
    trace = await swarm.run(
        swarm.engine(lead(says("", assign("w", "item3"), create("w"), assign("w", "item4")), says("x")))
    )
    assert [result.text for result in trace.turns[0].results] == ["item3 is w/3", "created w", "item4 is w/4"]
    assert [child.final_text for child in trace.children] == ["item3 is w/3", "item4 is w/4"]
    assert trace.signals == {"parallel": 0.5, "finish": 1.0}


async def test_a_name_is_unique_and_must_exist(swarm: Swarm) -> None:
    turns = (
        says("", create("w", "one"), create("w", "two")),
        says("", assign("v", "item1"), assign("w", "item1")),
        says("x"),
    )
    engine = swarm.engine(lead(*turns))
    trace = await swarm.run(engine)
    texts = [result.text for turn in trace.turns for result in turn.results]
    assert texts == [
        "created w",
        'error: a subagent named "w" already exists',
        'error: there is no subagent named "v"',
        "item1 is w/1",
    ]
    [child] = trace.children
    assert child.messages[0].text == "one"


async def test_a_name_holds_no_memory(swarm: Swarm) -> None:
    turns = says("", create("w", "be brief")), says("", assign("w", "item1")), says("", assign("w", "item2")), says("x")
    trace = await swarm.run(swarm.engine(lead(*turns)))
    first, second = trace.children
    assert [message.text for message in second.messages[:2]] == ["be brief", "item2"]
    assert "item1" not in swarm.tokenizer.decode(second.tokens)
    assert len(first.turns) == len(second.turns) == 2


async def test_only_the_final_message_returns(swarm: Swarm) -> None:
    def chatty(prompt: str, role: str) -> str:
        if returns(prompt):
            return completion_text("the answer", reasoning="private")
        return completion_text("an aside", reasoning="private", calls=[search("item7")])

    trace = await swarm.run(swarm.engine(lead(says("", create("w"), assign("w", "go")), says("x")), chatty))
    seen = swarm.tokenizer.decode(trace.tokens)
    assert "the answer" in seen
    assert not any(word in seen for word in ("private", "aside", "w/7"))


async def test_subagents_have_no_swarm_tools_and_are_frozen(swarm: Swarm) -> None:
    def greedy(prompt: str, role: str) -> str:
        return says("done") if returns(prompt) else says("", create("v"), assign("w", "item1"))

    trace = await swarm.run(swarm.engine(lead(says("", create("w"), assign("w", "go")), says("x")), greedy))
    [child] = trace.children
    assert [r.text for r in child.turns[0].results] == [
        'error: there is no tool "create_subagent"',
        'error: there is no tool "assign_task"',
    ]
    assert "create_subagent" not in swarm.tokenizer.decode(child.tokens[: child.turns[0].prompt_len])
    assert (trace.role, trace.trainable, child.role, child.trainable) == ("orchestrator", True, "subagent", False)


async def test_one_subagent_raises_one_never_ends_and_one_overflows_beside_healthy_ones(swarm: Swarm) -> None:
    class Partly:
        inner = swarm.engine(fan_out(6), lambda prompt, role: Partly.say(prompt, role))

        @staticmethod
        def say(prompt: str, role: str) -> str:
            if "<|im_middle|>item1<" in prompt:
                raise RuntimeError("lost")
            if "<|im_middle|>item2<" in prompt:
                return says("", search("item2"))
            if "<|im_middle|>item3<" in prompt:
                return says("", search("item3"), *[search("item")] * 90)
            return looks_up(prompt, role)

        async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
            return await self.inner.generate(prompt, sampling, role)

    trace = await swarm.run(Partly(), subagent_limits=Limits(5, 8000, 4000, notice="answer now"))
    assert [child.status for child in trace.children] == [
        "completed", "failed", "limit", "overflow", "completed", "completed"
    ]  # fmt: skip
    assert [result.text for result in trace.turns[0].results] == [
        "created w",
        "item0 is w/0",
        "error: w ended without an answer (failed)",
        "error: w ended without an answer (limit)",
        "error: w ended without an answer (overflow)",
        "item4 is w/4",
        "item5 is w/5",
    ]
    assert trace.children[1].error == "RuntimeError: lost"
    assert (trace.status, trace.signals["finish"]) == ("completed", 0.5)


async def test_an_answer_that_is_cut_is_none_but_stays_on_record(swarm: Swarm) -> None:
    def runs_on(prompt: str, role: str) -> str:
        return says("and on " * 500) if "<|im_middle|>item1<" in prompt else looks_up(prompt, role)

    trace = await swarm.run(swarm.engine(fan_out(3), runs_on))
    assert [result.text for result in trace.turns[0].results] == [
        "created w",
        "item0 is w/0",
        "error: w ended without an answer (limit)",
        "item2 is w/2",
    ]
    assert trace.children[1].messages[-1].text.startswith("and on and on")


async def test_a_thousand_subagents_in_one_stage(swarm: Swarm) -> None:
    limits = Limits(10, 1_000_000, 200_000)
    trace = await swarm.run(swarm.engine(fan_out(1000)), orchestrator_limits=limits)
    assert trace.final_text == " ".join(["created w", *(f"item{i % 20} is w/{i % 20}" for i in range(1000))])
    # The script gives 20 different subtasks, each 50 times: only the first of each is work of its own.
    assert trace.signals == {"parallel": 19 / 1000, "finish": 20 / 1000}
    assert critical_steps(trace) == 1 + 2 + 1


def content(trace: Trace) -> object:
    """All of a trace but the times."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("started", "generated", "ended")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    def tokens(one: Trace) -> list[object]:
        return [one.tokens, one.loss_mask, one.logprobs, [tokens(child) for child in one.children]]

    return strip(trace.to_json()), tokens(trace)


async def test_results_do_not_depend_on_scheduling(swarm: Swarm) -> None:
    class Sampled:
        """Draws its words from the seed and the prompt, as a real engine does; delayed at random."""

        def __init__(self, order: int) -> None:
            self.order = order

        async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
            delay = (hash((self.order, sampling.seed)) % 7) * 0.001
            await asyncio.sleep(delay)
            kind = sampling.seed % 3
            text = swarm.tokenizer.decode(prompt.ids)
            if role == "orchestrator":
                tasks = [assign("w", f"item{sampling.seed % 19 + i}") for i in range(5)]
                word = (
                    says(f"end {sampling.seed}")
                    if turn(text) == 3
                    else says("", create(f"w{turn(text)}"), create("w"), *tasks)
                )
            else:
                word = (
                    says(f"say {sampling.seed}")
                    if turn(text) == kind
                    else says("", search(f"item{sampling.seed % 20}"))
                )
            engine = ScriptedEngine(swarm.tokenizer, [word])
            chaos = ChaosEngine(engine, swarm.tokenizer, Chaos(drops=0.1 if role == "subagent" else 0.0), seed=9)
            return await chaos.generate(prompt, sampling, role)

    runs = [await swarm.run(Sampled(order)) for order in range(4)]
    assert all(content(run) == content(runs[0]) for run in runs)
    assert len(runs[0].children) == 15
    assert len({child.final_text for child in runs[0].children}) > 10
    other = await swarm.run(Sampled(0), sampling=Sampling(max_tokens=1, seed=4))
    assert content(other) != content(runs[0])


async def test_cancelling_the_orchestrator_cancels_every_subagent(swarm: Swarm) -> None:
    class Stuck:
        waiting = 0
        cancelled = 0
        all_wait = asyncio.Event()
        inner = swarm.engine(fan_out(50))

        async def generate(self, prompt: TokenSequence, sampling: Sampling, role: str) -> Completion:
            if role == "orchestrator":
                return await self.inner.generate(prompt, sampling, role)
            self.waiting += 1
            if self.waiting == 50:
                self.all_wait.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            raise AssertionError

    engine = Stuck()
    async with asyncio.TaskGroup() as group:
        episode = group.create_task(swarm.run(engine))
        await engine.all_wait.wait()
        episode.cancel()
    assert episode.cancelled()
    assert (engine.waiting, engine.cancelled) == (50, 50)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(1, 14),
    max_turns=st.integers(1, 8),
    child_turns=st.integers(1, 6),
    plan=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=8),
)
def test_the_budget_of_critical_steps_is_never_exceeded(
    tokenizer: Tokenizer,
    media_spec: MediaSpec,
    budget: int,
    max_turns: int,
    child_turns: int,
    plan: list[list[int]],
) -> None:
    """`plan`: per turn of the orchestrator, how many turns each subagent would like to take."""

    def orchestrator(prompt: str, role: str) -> str:
        now = turn(prompt)
        if "answer now" in prompt or now >= len(plan):
            return says("final")
        return says("", create("w"), *[assign("w", f"{wish} turns") for wish in plan[now]])

    def subagent(prompt: str, role: str) -> str:
        wish = int(re.findall(r"(\d) turns", prompt)[0])
        return says("done") if turn(prompt) + 1 >= wish or "answer now" in prompt else says("", search("item1"))

    async def episode() -> Trace:
        swarm = Swarm(tokenizer, media_spec)
        trace = await swarm.run(
            swarm.engine(orchestrator, subagent),
            orchestrator_limits=Limits(max_turns, 100_000, 4000, critical_steps=budget, notice="answer now"),
            subagent_limits=Limits(child_turns, 8000, 400, notice="answer now"),
        )
        swarm.index.close()
        return trace

    trace = asyncio.run(episode())
    assert critical_steps(trace) <= budget
    assert len(trace.turns) <= max_turns
    assert all(1 <= len(child.turns) <= child_turns for child in trace.children)
    # The orchestrator always gets to answer, and is warned before an answer that it did not choose to give.
    if budget > 1 and max_turns > 1:
        assert trace.final_text == "final"
    natural = 1 + len(plan) + sum(max((min(w, child_turns) for w in stage), default=0) for stage in plan)
    if natural < budget and len(plan) + 1 < max_turns:
        assert (trace.status, critical_steps(trace)) == ("completed", natural)


async def test_with_two_steps_left_there_is_no_room_for_a_subagent(swarm: Swarm) -> None:
    limits = Limits(9, 9000, 4000, critical_steps=2, notice="answer now")
    trace = await swarm.run(
        swarm.engine(lead(says("", create("w"), assign("w", "item1")), says("x"))), orchestrator_limits=limits
    )
    assert trace.turns[0].results[1].text == "error: no steps are left for a subagent"
    assert (trace.children, trace.status, trace.final_text) == ((), "limit", "x")


async def test_the_single_agent_has_the_tools_without_the_swarm(swarm: Swarm) -> None:
    script = lead(says("", create("w"), search("item5")), says("x"))
    trace = await alone(
        ScriptedEngine(swarm.tokenizer, script),
        Policy(swarm.tokenizer, swarm.media_spec, Sampling(1)),
        World(("the price of item5",), [swarm.search]),
        Limits(5, 4000, 400),
    )
    texts = [result.text for result in trace.turns[0].results]
    assert texts == ['error: there is no tool "create_subagent"', "item5 w/5"]
    assert (trace.messages[0].role, trace.signals) == ("user", {})


async def test_times_are_those_of_one_clock_and_nest(swarm: Swarm) -> None:
    trace = await swarm.run(ChaosEngine(swarm.engine(fan_out(5)), swarm.tokenizer, Chaos(delay_s=0.01), seed=1))
    stage = trace.turns[0]
    for child in trace.children:
        times = [t for turn in child.turns for t in (turn.started, turn.generated, turn.ended)]
        assert times == sorted(times)
        assert stage.generated <= times[0]
        assert times[-1] <= stage.ended
