"""One agent: a model and its tools, turn after turn, tokens in and tokens out (appendix D).

The prompt is rendered once. What the model sampled is appended token by token, never re-rendered, so the recorded
tokens are exactly those that the engine saw and drew.
"""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baltoro.agent.engine import Completion, Engine, Sampling
from baltoro.agent.tool import CallContext, Tool, ToolResult
from baltoro.agent.trace import Status, Trace, Turn, spread
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Message, TokenSequence, ToolCall, tool_result, user
from baltoro.chat.parse import Parsed, parse_completion
from baltoro.chat.render import render, render_tool_results
from baltoro.chat.schema import parse_arguments
from baltoro.chat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limits:
    """The bounds of one agent.

    max_turns: model calls. max_context_tokens: prompt and completion together; a turn that might not fit is not
    begun, and the run ends with status "overflow" (E.6: a failure, not a truncation). max_turn_tokens: per completion;
    it takes the place of Sampling.max_tokens. critical_steps: the budget of section 3, None for no bound.
    notice: said to the model before its last turn, after the tool results; empty says nothing.
    """

    max_turns: int
    max_context_tokens: int
    max_turn_tokens: int
    critical_steps: int | None = None
    notice: str = ""


def derive_seed(seed: int, *path: int) -> int:
    """A seed for one place in the tree of agents, turns and calls; it depends on the place, never on the time."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def run_agent(
    engine: Engine,
    tokenizer: Tokenizer,
    media_spec: MediaSpec,
    *,
    role: str,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    limits: Limits,
    sampling: Sampling,
    declare_tools: bool,
    trainable: bool = False,
    thinking: bool = True,
    origin: float | None = None,
) -> Trace:
    """Run until the model answers without a tool call, a limit is reached, or the engine fails.

    A turn costs one critical step and, where its calls started agents, the most steps that one of them took. The last
    turn that the budget or max_turns allows does not execute calls: its text is the answer, with status "limit".
    `origin`: the episode's start on time.monotonic; now, where this agent is the first.

    Never raises for the engine's, a tool's or the model's faults; being cancelled cancels every agent below it.
    """
    begin = time.monotonic() if origin is None else origin
    toolbox = {tool.spec.name: tool for tool in tools}
    declared = [tool.spec for tool in tools] if declare_tools else []
    opening = render(messages, tokenizer, media_spec, declared, add_generation_prompt=True, thinking=thinking)
    context = _Context(list(messages), TokenSequence(opening.ids, opening.media))
    turns: list[Turn] = []
    spent = 0
    noticed = False

    def finish(status: Status, text: str = "", error: str = "") -> Trace:
        return Trace(
            role=role,
            messages=tuple(context.messages),
            tokens=tuple(context.prompt.ids),
            loss_mask=spread(turns, len(context.prompt.ids), lambda turn: [1] * len(turn.ids), 0),
            logprobs=spread(turns, len(context.prompt.ids), lambda turn: turn.logprobs, 0.0),
            media=tuple(context.prompt.media),
            turns=tuple(turns),
            status=status,
            final_text=text,
            trainable=trainable,
            error=error,
        )

    while True:
        if len(context.prompt.ids) + limits.max_turn_tokens > limits.max_context_tokens:
            return finish("overflow")
        started = time.monotonic() - begin
        seed = derive_seed(sampling.seed, len(turns))
        try:
            completion = await engine.generate(
                context.prompt, replace(sampling, max_tokens=limits.max_turn_tokens, seed=seed), role
            )
        except Exception as error:  # the boundary for engine failures: a failed rollout is data
            return finish("failed", error=f"{type(error).__name__}: {error}")
        generated = time.monotonic() - begin
        prompt_len = len(context.prompt.ids)
        parsed = parse_completion(completion.ids, tokenizer, thinking)
        message = parsed.message
        malformed = _malformed_calls(parsed, completion, tokenizer)
        context.prompt.ids.extend(completion.ids)
        context.messages.append(message)
        spent += 1
        last = _left(limits, len(turns) + 1, spent) == 0

        results: list[ToolResult] = []
        answers: list[Message] = []
        if not last:
            steps_left = None if limits.critical_steps is None else limits.critical_steps - spent
            contexts = [
                CallContext(steps_left, derive_seed(sampling.seed, len(turns), index), begin)
                for index in range(len(message.tool_calls))
            ]
            results = await run_calls(message.tool_calls, contexts, toolbox)
            spent += max((result.steps for result in results), default=0)
            answers = [
                tool_result(call.id, *result.shown) for call, result in zip(message.tool_calls, results, strict=True)
            ]
            if malformed:
                answers.append(tool_result("malformed call", f"error: {malformed}"))
        turns.append(
            Turn(
                prompt_len=prompt_len,
                ids=tuple(completion.ids),
                logprobs=tuple(completion.logprobs),
                weight_version=completion.weight_version,
                message=message,
                results=tuple(answers),
                children=tuple(child for result in results for child in result.children),
                started=started,
                generated=generated,
                ended=time.monotonic() - begin,
            )
        )
        if not answers:
            forced = noticed or message.tool_calls or malformed or completion.finish_reason == "length"
            return finish("limit" if forced else "completed", message.text.strip())
        noticed = bool(limits.notice) and _left(limits, len(turns), spent) == 1
        following = [*answers, user(limits.notice)] if noticed else answers
        rendered = render_tool_results(following, tokenizer, media_spec, thinking=thinking)
        context.follow(following, rendered, tokenizer.im_end)


def _malformed_calls(parsed: Parsed, completion: Completion, tokenizer: Tokenizer) -> str:
    """What was wrong with calls that could not be read, for the model; empty where it tried none, or was cut."""
    tried = completion.ids.count(tokenizer.tool_call_begin)
    if tried <= len(parsed.message.tool_calls) or completion.finish_reason == "length":
        return ""
    return "; ".join(parsed.errors)


def _left(limits: Limits, turns: int, spent: int) -> int:
    """Turns that may still be begun."""
    left = limits.max_turns - turns
    return left if limits.critical_steps is None else min(left, limits.critical_steps - spent)


@dataclass(slots=True)
class _Context:
    """What one agent has read and written; its prompt grows in place."""

    messages: list[Message]
    prompt: TokenSequence

    def follow(self, messages: Sequence[Message], rendered: TokenSequence, im_end: int) -> None:
        self.messages += messages
        if self.prompt.ids[-1] != im_end:
            self.prompt.ids.append(im_end)  # cut by length after its calls: it was not sampled, so it is no target
        self.prompt.ids.extend(rendered.ids)
        self.prompt.media.extend(rendered.media)


async def run_calls(
    calls: Sequence[ToolCall], contexts: Sequence[CallContext], toolbox: dict[str, Tool]
) -> list[ToolResult]:
    """All calls of a turn: those of sequential tools first, then the others at the same time; ends when all ended."""
    results: dict[int, ToolResult] = {}
    waiting: list[int] = []
    for index, call in enumerate(calls):
        if len(calls) == 1 or (call.name in toolbox and toolbox[call.name].sequential):
            results[index] = await _run_call(call, contexts[index], toolbox)
        else:
            waiting.append(index)
    if not waiting:
        return [results[index] for index in range(len(calls))]
    async with asyncio.TaskGroup() as group:
        tasks = {index: group.create_task(_run_call(calls[index], contexts[index], toolbox)) for index in waiting}
    results.update((index, task.result()) for index, task in tasks.items())
    return [results[index] for index in range(len(calls))]


async def _run_call(call: ToolCall, context: CallContext, toolbox: dict[str, Tool]) -> ToolResult:
    tool = toolbox.get(call.name)
    if tool is None:
        return ToolResult(error=f'there is no tool "{call.name}"')
    try:
        arguments = parse_arguments(call.arguments, tool.spec.parameters)
    except ValueError as error:
        return ToolResult(error=str(error))
    try:
        return await tool.call(arguments, context)
    except Exception as error:  # the boundary for tool failures: one call never harms its siblings
        return ToolResult(error=f"{call.name} failed: {type(error).__name__}: {error}")
