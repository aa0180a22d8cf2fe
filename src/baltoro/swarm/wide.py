"""Wide search, solved by a single agent or by a swarm under the same budget of critical steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.loop import Limits
from baltoro.agent.tool import Tool
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.tokenizer import Tokenizer
from baltoro.score.table import item_f1, parse_table
from baltoro.swarm.demonstrations import HITS, NOTICE, SINGLE_PROMPT, SWARM_PROMPT
from baltoro.swarm.episode import run_single, run_swarm
from baltoro.tools.reader import Reader
from baltoro.tools.search import Search, SearchIndex
from baltoro.world.document import Document
from baltoro.world.tasks import WideSearch

Mode = Literal["single", "swarm"]


@dataclass(frozen=True)
class WideRules:
    """Bounds of the agents. E.8 allows 100 / 100 steps; a context here must also fit the engine."""

    max_context_tokens: int
    max_turn_tokens: int
    subagent_turns: int = 8
    subagent_turn_tokens: int = 96
    max_turns: int = 100


class Library:
    """Pages with the tools to find and read them."""

    def __init__(self, documents: list[Document]):
        self.pages: Mapping[str, Document] = {document.url: document for document in documents}
        self.index = SearchIndex.build(documents)
        self.tools: list[Tool] = [Search(self.index, HITS), Reader(self.pages)]


async def solve(
    engine: Engine,
    tokenizer: Tokenizer,
    media: MediaSpec,
    task: WideSearch,
    library: Library,
    *,
    mode: Mode,
    critical_steps: int | None,
    sampling: Sampling,
    rules: WideRules,
    role: str,
) -> Trace:
    """The trace with signal `perf`, the item-F1 of the answer. A failure scores what its text is worth: nothing."""
    limits = Limits(
        max_turns=rules.max_turns,
        max_context_tokens=rules.max_context_tokens,
        max_turn_tokens=rules.max_turn_tokens,
        critical_steps=critical_steps,
        notice=NOTICE,
    )
    if mode == "single":
        trace = await run_single(
            engine,
            tokenizer,
            media,
            task_prompt=(task.prompt,),
            system_prompt=SINGLE_PROMPT,
            tools=library.tools,
            limits=limits,
            sampling=sampling,
            declare_tools=False,
            role=role,
        )
    else:
        trace = await run_swarm(
            engine,
            tokenizer,
            media,
            task_prompt=(task.prompt,),
            system_prompt=SWARM_PROMPT,
            orchestrator_tools=library.tools,
            subagent_tools=library.tools,
            orchestrator_limits=limits,
            subagent_limits=Limits(
                max_turns=rules.subagent_turns,
                max_context_tokens=rules.max_context_tokens,
                max_turn_tokens=rules.subagent_turn_tokens,
                notice=NOTICE,
            ),
            sampling=sampling,
            # Frozen subagents are part of the environment: only the orchestrator explores.
            subagent_sampling=replace(sampling, temperature=0.0),
            declare_tools=False,
        )
    return trace.with_signals(perf=item_f1(parse_table(trace.final_text, task.columns), task.gold))
