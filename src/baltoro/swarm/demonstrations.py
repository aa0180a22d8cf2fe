"""Text-only demonstrations for supervised fine-tuning: what a careful agent does with the real tools, written by rule
on training worlds. Token for token they have the shape that `agent.loop` produces."""

import json
import random
from collections.abc import Sequence

from baltoro.agent.tool import ToolResult
from baltoro.chat.messages import Message, ToolCall, assistant, system, tool_result, user
from baltoro.swarm.tools import unanswered
from baltoro.tools.search import SearchIndex, hit_lines
from baltoro.world.entities import World
from baltoro.world.scenes import COLOUR_NAMES, COLOURS, SHAPES
from baltoro.world.tasks import closed, label, listed, row, subtask, template, wide_search

SINGLE_PROMPT = "Tools: search, open."
SWARM_PROMPT = "Tools: search, open, create_subagent, assign_task."
PYTHON_PROMPT = "Tools: python."
NOTICE = "Answer now."
SUBAGENT = "reader"
HITS = 2
_NOT_FOUND = "not found"
_FAILURES = (ToolResult((_NOT_FOUND,)), ToolResult(error=unanswered(SUBAGENT, "limit")))
_BOX_CODE = """import numpy as np
im = np.load('image.npy').astype(int)
y, x = np.where(abs(im - {colour}).sum(2) < 60)
h, w, _ = im.shape
print(*(round(v * 32 / s) for v, s in ((x.min(), w), (y.min(), h), (x.max() + 1, w), (y.max() + 1, h))))"""


def subagent_prompt(columns: Sequence[str]) -> str:
    """The row to be filled in; its task is a line of the list."""
    return f"Fill in {template('name', columns)}"


class Demonstrator:
    """Demonstrations on one world; every draw comes from the generator that is passed in."""

    def __init__(self, world: World):
        self.world = world
        self.index = SearchIndex.build(world.documents)
        self.pages = {document.url: document for document in world.documents}

    def subagent(self, rng: random.Random) -> list[Message]:
        """One entity: search, open, answer with one row; `not found` for an entity that no page is about."""
        task = wide_search(rng, self.world, 1, 1)
        name = task.names[0]
        number, left = rng.randint(1, 16), rng.randint(1, 16)
        messages = [system(subagent_prompt(task.columns)), user(subtask(number, name, left))]
        if rng.random() < 0.05:
            other = rng.choice(self.world.kinds).entities
            name = " ".join(w[::-1] for w in rng.choice(other).name.split())
            messages[1] = user(subtask(number, name, left))
            self._search(messages, 0, name)
            return [*messages, assistant(_NOT_FOUND)]
        self._search(messages, 0, name)
        self._open(messages, 1, name)
        if rng.random() < 0.25:
            messages.append(user(NOTICE))  # its last turn may be announced
        return [*messages, assistant(row(number, name, task.gold[name], task.columns))]

    def single(self, rng: random.Random, low: int, high: int) -> list[Message]:
        """Entity after entity; the reasoning notes what was found and what comes next. Sometimes told to answer before
        it is done."""
        task = wide_search(rng, self.world, low, high)
        messages = [system(SINGLE_PROMPT), user(task.prompt)]
        notes: list[str] = []
        cut = rng.randrange(2 * len(task.names)) if rng.random() < 0.3 else None
        note = ""
        for i, name in enumerate(task.names):
            self._search(messages, 2 * i, name, f"{note}{label(i + 1)}{template(name, task.columns)}")
            note = ""
            if cut == 2 * i:
                break
            self._open(messages, 2 * i + 1, name)
            notes.append(row(i + 1, name, task.gold[name], task.columns))
            note = f"{notes[-1]}\n"
            if cut == 2 * i + 1:
                break
        if cut is not None:
            messages.append(user(NOTICE))
        return [*messages, assistant(closed(notes), reasoning=f"{note}{label(len(notes) + 1)}" if note else "")]

    def orchestrator(
        self, rng: random.Random, low: int, high: int, widths: Sequence[tuple[int, float]], failing: float = 0.0
    ) -> list[Message]:
        """Subagents in cohorts of one width, drawn from `widths` as (width, weight), 0 for all at once; sometimes told
        to answer between two cohorts. No cohort is cut short: whether a call follows depends on the task alone.
        failing: share of subagents that find nothing or have no answer; their rows stay empty, and the others whole.
        """
        task = wide_search(rng, self.world, low, high)
        width = rng.choices([w for w, _ in widths], [p for _, p in widths])[0] or len(task.names)
        messages = [system(SWARM_PROMPT), user(task.prompt)]
        # The subagent is created in the turn that first needs it: a turn of its own would be one more critical step.
        create = _call("create_subagent", 0, name=SUBAGENT, system_prompt=subagent_prompt(task.columns))
        results = [tool_result(create.id, f"created {SUBAGENT}")]
        calls = [create]
        names = list(task.names)
        subtasks = listed(names)
        rows: list[str] = []
        if rng.random() < 0.2:
            names = names[: width * rng.randint(1, -(-len(names) // width))]
        for begin in range(0, len(names), width):
            for i, name in enumerate(names[begin : begin + width], 1 + begin):
                calls.append(_call("assign_task", i, agent=SUBAGENT, prompt=subtasks[i - 1]))
                if failing and rng.random() < failing:
                    rows.append(template(f"{label(i)}{name}", [""]))
                    results.append(tool_result(calls[-1].id, *rng.choice(_FAILURES).shown))
                else:
                    rows.append(row(i, name, task.gold[name], task.columns))
                    results.append(tool_result(calls[-1].id, rows[-1]))
            messages += [assistant(tool_calls=tuple(calls)), *results]
            calls, results = [], []
        if len(names) < len(task.names):
            messages.append(user(NOTICE))
        return [*messages, assistant(closed(rows))]

    def pixels(self, rng: random.Random) -> list[Message]:
        """An image operation as code, on a picture that is named but never shown (zero-vision SFT, 2.2): find an object
        by its colour and print its box in 32nds of the sides."""
        colour = rng.choice(COLOUR_NAMES)
        target = f"{colour} {rng.choice(SHAPES)}"
        question = rng.choice(("box of the {}", "box the {}", "bounds of the {}")).format(target)
        code = _BOX_CODE.format(colour=list(COLOURS[colour]))
        call = _call("python", 0, code=code)
        left, top = rng.randrange(24), rng.randrange(24)
        box = f"{left} {top} {rng.randrange(left + 4, 32)} {rng.randrange(top + 4, 32)}"
        return [
            system(PYTHON_PROMPT),
            user(question),
            assistant(tool_calls=(call,)),
            tool_result(call.id, f"{box}\n"),
            assistant(box),
        ]

    def _search(self, messages: list[Message], index: int, query: str, reasoning: str = "") -> None:
        call = _call("search", index, query=query)
        messages.append(assistant(reasoning=reasoning, tool_calls=(call,)))
        messages.append(tool_result(call.id, hit_lines(self.index.search(query, HITS))))

    def _open(self, messages: list[Message], index: int, name: str) -> None:
        call = _call("open", index, url=name)
        messages.append(assistant(tool_calls=(call,)))
        messages.append(tool_result(call.id, *self.pages[name].body))


def _call(tool: str, index: int, **arguments: str) -> ToolCall:
    text = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    return ToolCall(f"functions.{tool}:{index}", tool, text)
