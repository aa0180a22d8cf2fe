"""One task by an orchestrator with subagents (section 3)."""

from collections.abc import Sequence
from dataclasses import replace

from baltoro.agent.engine import Engine, Sampling
from baltoro.agent.loop import Limits, run_agent
from baltoro.agent.tool import CallContext, Tool
from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Message, Part, system, user
from baltoro.chat.tokenizer import Tokenizer
from baltoro.swarm.signals import with_swarm_signals
from baltoro.swarm.tools import swarm_tools


async def run_swarm(
    engine: Engine,
    tokenizer: Tokenizer,
    media_spec: MediaSpec,
    *,
    task_prompt: Sequence[Part],
    system_prompt: str,
    orchestrator_tools: Sequence[Tool],
    subagent_tools: Sequence[Tool],
    orchestrator_limits: Limits,
    subagent_limits: Limits,
    sampling: Sampling,
    declare_tools: bool,
    subagent_sampling: Sampling | None = None,
    trainable: bool = True,
    thinking: bool = True,
) -> Trace:
    """The orchestrator's trace with its subagents' inside, and the signals `parallel` and `finish`.

    `orchestrator_tools` are those beside create_subagent and assign_task. Subagents have role "subagent", are never
    trainable (frozen, section 3), start no agents, and take at most the orchestrator's remaining steps less one. One
    whose last turn is cut by its limit of tokens has no answer. An empty system prompt is left out, here as for
    subagents. Subagents draw as the orchestrator does unless `subagent_sampling` says otherwise; their seeds follow
    from their place in the tree.
    """

    async def run_subagent(prompt: str, task: str, context: CallContext) -> Trace:
        limits = subagent_limits
        if context.steps_left is not None:
            limits = replace(limits, max_turns=min(limits.max_turns, context.steps_left - 1))
        trace = await run_agent(
            engine,
            tokenizer,
            media_spec,
            role="subagent",
            messages=_opening(prompt, (task,)),
            tools=subagent_tools,
            limits=limits,
            sampling=replace(subagent_sampling or sampling, seed=context.seed),
            declare_tools=declare_tools,
            thinking=thinking,
            origin=context.origin,
        )
        # Half an answer would go on in the orchestrator's: its model runs on where the subagent's was cut.
        cut = bool(trace.turns) and trace.turns[-1].ids[-1] != tokenizer.im_end
        return replace(trace, final_text="") if cut else trace

    trace = await run_agent(
        engine,
        tokenizer,
        media_spec,
        role="orchestrator",
        messages=_opening(system_prompt, task_prompt),
        tools=[*orchestrator_tools, *swarm_tools(run_subagent)],
        limits=orchestrator_limits,
        sampling=sampling,
        declare_tools=declare_tools,
        trainable=trainable,
        thinking=thinking,
    )
    return with_swarm_signals(trace)


def _opening(system_prompt: str, task: Sequence[Part]) -> list[Message]:
    return [system(system_prompt), user(*task)] if system_prompt else [user(*task)]
