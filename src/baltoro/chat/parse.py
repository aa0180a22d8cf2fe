"""From sampled ids back to a message (model.md sections 3.10, 11). Structure is read from control ids alone, so text
that spells a marker stays text; what a model got wrong is reported, never raised."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from baltoro.chat.messages import Message, ToolCall, assistant
from baltoro.chat.tokenizer import Tokenizer

_CALL_ID = re.compile(r"[^<]+:[0-9]+")
# Models write this word, which is no token, in place of <|tool_calls_section_begin|>.
_STRAY_BEGIN = "<|tool_call_section_begin|>"
_STRAY_END = "<|tool_call_section_end|>"


@dataclass(frozen=True)
class Parsed:
    """`errors` says in words what was wrong; each malformed call is quoted there and absent from the message."""

    message: Message
    errors: tuple[str, ...] = ()


def parse_completion(ids: Sequence[int], tokenizer: Tokenizer, thinking: bool = True) -> Parsed:
    """Reads what follows the generation prompt; `thinking` says which of the two prompts it was.

    Arguments come back exactly as written: whether they are JSON and fit the schema is for the tool's caller.
    """
    errors: list[str] = []
    body = list(ids)
    if tokenizer.im_end in body:
        body = body[: body.index(tokenizer.im_end)]
    else:
        errors.append("the turn was cut off before <|im_end|>")

    reasoning = ""
    if thinking:
        if tokenizer.end_think not in body:
            return Parsed(assistant(reasoning=tokenizer.decode(body)), (*errors, "the reasoning has no </think>"))
        cut = body.index(tokenizer.end_think)
        reasoning, body = tokenizer.decode(body[:cut]), body[cut + 1 :]

    content, section = _split_section(body, tokenizer)
    calls = _read_section(section, tokenizer, errors)
    return Parsed(assistant(content, reasoning=reasoning, tool_calls=tuple(calls)), tuple(errors))


def _split_section(body: list[int], tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Content, and the ids behind the marker that opens the tool section."""
    markers = (tokenizer.tool_calls_section_begin, tokenizer.tool_call_begin)
    start = next((i for i, token in enumerate(body) if token in markers), len(body))
    content, section = tokenizer.decode(body[:start]), body[start:]
    if section and section[0] == tokenizer.tool_calls_section_begin:
        return content, section[1:]
    if section and content.rstrip().endswith(_STRAY_BEGIN):
        return content.rstrip().removesuffix(_STRAY_BEGIN), section
    return content, section


def _read_section(section: list[int], tokenizer: Tokenizer, errors: list[str]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    borders = (tokenizer.tool_call_begin, tokenizer.tool_call_end, tokenizer.tool_calls_section_end)
    start = 0
    while start < len(section):
        end = next((i for i in range(start + 1, len(section)) if section[i] in borders), len(section))
        piece = section[start:end]
        if piece[0] == tokenizer.tool_call_begin:
            closed = end < len(section) and section[end] == tokenizer.tool_call_end
            call = _read_call(piece[1:], closed, tokenizer)
            if isinstance(call, ToolCall):
                calls.append(call)
            else:
                errors.append(call)
        else:
            outside = tokenizer.decode(piece[1:] if piece[0] in borders else piece).strip()
            if outside not in ("", _STRAY_END):
                errors.append(f"text outside a tool call in the tool section: {outside}")
        start = end
    return calls


def _read_call(piece: list[int], closed: bool, tokenizer: Tokenizer) -> ToolCall | str:
    """One call from between its begin and end markers, or what is wrong with it."""
    quoted = tokenizer.decode(piece)
    if tokenizer.tool_call_argument_begin not in piece:
        return f"a tool call has no arguments: {quoted}"
    cut = piece.index(tokenizer.tool_call_argument_begin)
    call_id = tokenizer.decode(piece[:cut]).strip()
    if not _CALL_ID.fullmatch(call_id):
        return f"a tool call's id is not of the form functions.name:index: {quoted}"
    if not closed:
        return f"a tool call was not closed: {quoted}"
    name = call_id.removeprefix("functions.").rpartition(":")[0]
    return ToolCall(call_id, name, tokenizer.decode(piece[cut + 1 :]))
