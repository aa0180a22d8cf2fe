import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import Message, ToolCall, assistant
from baltoro.chat.parse import (
    ArgumentsDelta,
    CallBegun,
    CallEnded,
    CompletionParser,
    ContentDelta,
    Event,
    Parsed,
    ReasoningDelta,
    fold,
    parse_completion,
)
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer

CONTROL = Tokenizer({bytes([b]): b for b in range(256)}).special
STRAY = "<|tool_call_section_begin|>"
# Any Unicode text, salted with text that spells control tokens.
markers = st.sampled_from([*CONTROL, STRAY, STRAY[:9], STRAY[:-1]])
hostile_text = st.lists(st.one_of(st.text(max_size=9), markers), max_size=4).map("".join)
names = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), min_size=1, max_size=9)
calls = st.builds(lambda n, i, a: ToolCall(f"functions.{n}:{i}", n, a), names, st.integers(0, 200), hostile_text)
assistants = st.builds(
    lambda text, reasoning, calls: assistant(text, reasoning=reasoning, tool_calls=tuple(calls)),
    hostile_text,
    hostile_text,
    st.lists(calls, max_size=3),
)


def said(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a completion in which every control token's name stands for that control token."""
    pieces = re.split(f"({'|'.join(map(re.escape, CONTROL))})", text)
    return [i for p in pieces for i in ([tokenizer.special[p]] if p in CONTROL else tokenizer.encode(p))]


def fields(message: Message) -> tuple[object, ...]:
    return message.role, message.content, message.reasoning, message.tool_calls, message.tool_call_id, message.name


@given(message=assistants)
def test_reads_back_what_was_rendered(tokenizer: Tokenizer, message: Message) -> None:
    sequence = render([message], tokenizer, MediaSpec.K25)
    parsed = parse_completion(sequence.ids[sequence.loss_mask.index(1) :], tokenizer)
    assert parsed.errors == ()
    assert fields(parsed.message) == fields(message)


@given(message=assistants)
def test_reads_back_instant_mode(tokenizer: Tokenizer, message: Message) -> None:
    message = assistant(message.text, tool_calls=message.tool_calls)
    sequence = render([message], tokenizer, MediaSpec.K25, thinking=False)
    parsed = parse_completion(sequence.ids[sequence.loss_mask.index(1) :], tokenizer, thinking=False)
    assert parsed.errors == ()
    assert fields(parsed.message) == fields(message)


STRUCTURE = [name for name in CONTROL if "tool" in name or "think" in name]


@given(
    pieces=st.lists(st.sampled_from(["7", "7", "f:7", *STRUCTURE, STRAY]), max_size=30),
    end=st.sampled_from(["", "<|im_end|>", "<|im_end|>7"]),
    thinking=st.booleans(),
)
def test_no_word_of_a_broken_completion_is_lost(
    tokenizer: Tokenizer, pieces: list[str], end: str, thinking: bool
) -> None:
    """Whatever the order of the control tokens, each 7 turns up once: in the message or in what was wrong with it."""
    parsed = parse_completion(said(tokenizer, "".join(pieces) + end), tokenizer, thinking)
    message = parsed.message
    kept = [message.reasoning, message.text, *parsed.errors]
    kept += [text for call in message.tool_calls for text in (call.id, call.arguments)]
    assert "".join(kept).count("7") == "".join(pieces).count("7")


CALL = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
F = ToolCall("functions.f:0", "f", "{}")


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        # The begin of a section that the model misspells, as text, and its end as text or as token.
        (f"r</think>c{STRAY}{CALL}{END}", assistant("c", reasoning="r", tool_calls=(F,))),
        (f"r</think>c\n{STRAY}\n{CALL}<|tool_call_section_end|>", assistant("c\n", reasoning="r", tool_calls=(F,))),
        # Without a call behind it, it is text.
        (f"r</think>write {STRAY} like so", assistant(f"write {STRAY} like so", reasoning="r")),
        # White space around ids and calls means nothing; ids keep what the model made of them.
        (
            f"</think>{BEGIN}\n<|tool_call_begin|> a-b:12 <|tool_call_argument_begin|> 1 <|tool_call_end|>\n{CALL}",
            assistant(tool_calls=(ToolCall("a-b:12", "a-b", " 1 "), F)),
        ),
        # A tool section inside the reasoning is reasoning.
        (f"{BEGIN}{CALL}{END}</think>c", assistant("c", reasoning=f"{BEGIN}{CALL}{END}")),
        # A second </think> and other control tokens out of place become text.
        ("r</think>a</think><think>b[BOS]", assistant("a</think><think>b[BOS]", reasoning="r")),
        # The section's end may be missing, and a section may be empty.
        (f"</think>{BEGIN}{CALL}", assistant(tool_calls=(F,))),
        (f"</think>c{BEGIN}{END}", assistant("c")),
    ],
)
def test_accepts(tokenizer: Tokenizer, completion: str, message: Message) -> None:
    parsed = parse_completion(said(tokenizer, completion + "<|im_end|>"), tokenizer)
    assert parsed.errors == ()
    assert fields(parsed.message) == fields(message)


@pytest.mark.parametrize(
    ("completion", "message", "error"),
    [
        ("all reasoning<|im_end|>", assistant(reasoning="all reasoning"), "no </think>"),
        ("r</think>half an ans", assistant("half an ans", reasoning="r"), "cut off"),
        (
            f"</think>{BEGIN}{CALL}<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{{<|im_end|>",
            assistant(tool_calls=(F,)),
            "not closed: functions.g:1",
        ),
        (
            f"</think>{BEGIN}<|tool_call_begin|>functions.g:1{CALL}<|im_end|>",
            assistant(tool_calls=(F,)),
            "no arguments",
        ),
        (
            f"</think>{BEGIN}<|tool_call_begin|>g<|tool_call_argument_begin|><|tool_call_end|>{CALL}{END}<|im_end|>",
            assistant(tool_calls=(F,)),
            "not of the form functions.name:index",
        ),
        (f"</think>{BEGIN}f(x){CALL}{END}<|im_end|>", assistant(tool_calls=(F,)), r"outside a tool call.*f\(x\)"),
        (f"</think>{BEGIN}{CALL}{END}and so<|im_end|>", assistant(tool_calls=(F,)), "outside a tool call.*and so"),
        (f"</think>{BEGIN}{CALL}and so{END}<|im_end|>", assistant(tool_calls=(F,)), "outside a tool call.*and so"),
        (f"</think>{BEGIN}{CALL}{BEGIN}{CALL}<|im_end|>", assistant(tool_calls=(F, F)), "outside a tool call.*begin"),
    ],
)
def test_reports(tokenizer: Tokenizer, completion: str, message: Message, error: str) -> None:
    parsed = parse_completion(said(tokenizer, completion), tokenizer)
    assert isinstance(parsed, Parsed)
    assert len(parsed.errors) == 1
    assert re.search(error, parsed.errors[0], re.DOTALL)
    assert fields(parsed.message) == fields(message)


def test_what_follows_the_end_of_the_turn_is_not_read(tokenizer: Tokenizer) -> None:
    parsed = parse_completion(said(tokenizer, f"r</think>c<|im_end|>{BEGIN}{CALL}"), tokenizer)
    assert parsed.errors == ()
    assert fields(parsed.message) == fields(assistant("c", reasoning="r"))


DELTAS = (ReasoningDelta, ContentDelta, ArgumentsDelta)


def told(message: Message) -> list[Event]:
    """The events of a faultless turn, each text in one piece."""
    events: list[Event] = [ReasoningDelta(message.reasoning), ContentDelta(message.text)]
    for call in message.tool_calls:
        events += [CallBegun(call.id, call.name), ArgumentsDelta(call.arguments), CallEnded()]
    return [event for event in events if not (isinstance(event, DELTAS) and not event.text)]


def joined(events: list[Event]) -> list[Event]:
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, DELTAS) and isinstance(last, DELTAS) and type(event) is type(last):
            whole[-1] = type(event)(last.text + event.text)
        else:
            whole.append(event)
    return whole


@given(message=assistants)
def test_streams_what_was_rendered_with_no_character_cut(
    tokenizer: Tokenizer, byte_tokenizer: Tokenizer, message: Message
) -> None:
    """Tokens of many characters or of one byte each: the same story, and no delta holds a broken character."""
    for t in (tokenizer, byte_tokenizer):
        sequence = render([message], t, MediaSpec.K25)
        parser = CompletionParser(t)
        events = [event for i in sequence.ids[sequence.loss_mask.index(1) :] for event in parser.feed(i)]
        assert parser.finish() == []
        assert joined(events) == told(message)
        assert all(event.text for event in events if isinstance(event, DELTAS))
        if "\ufffd" not in message.reasoning + message.text + "".join(c.arguments for c in message.tool_calls):
            assert not any("\ufffd" in event.text for event in events if isinstance(event, DELTAS))


def test_a_delta_comes_with_the_token_that_completes_it(byte_tokenizer: Tokenizer) -> None:
    t = byte_tokenizer
    parser = CompletionParser(t)

    def feed(text: str) -> list[str]:
        return ["".join(e.text for e in parser.feed(i) if isinstance(e, DELTAS)) for i in said(t, text)]

    assert feed("a天") == ["a", "", "", "天"]
    assert feed("</think>") == [""]
    # What may become the stray word waits until it cannot any more.
    assert feed("b<|tool_x") == ["b", *[""] * 7, "<|tool_x"]
    assert feed(f"{STRAY} \n.") == [*[""] * (len(STRAY) + 2), f"{STRAY} \n."]
    assert feed(f"{STRAY}\n<|tool_call_begin|>") == [""] * (len(STRAY) + 2)
    assert feed("f:0<|tool_call_argument_begin|>{é") == ["", "", "", "", "{", "", "é"]


def test_arguments_have_no_longest_length(byte_tokenizer: Tokenizer) -> None:
    arguments = '{"text": "' + "<|tool_call_end|> \n" * 20_000 + '"}'
    message = assistant(tool_calls=(ToolCall("functions.f:0", "f", arguments),))
    sequence = render([message], byte_tokenizer, MediaSpec.K25)
    parsed = parse_completion(sequence.ids[sequence.loss_mask.index(1) :], byte_tokenizer)
    assert parsed == Parsed(parsed.message)
    assert fields(parsed.message) == fields(message)


@given(ids=st.lists(st.integers(0, 319), max_size=40), thinking=st.booleans())
def test_any_ids_at_all_are_read(byte_tokenizer: Tokenizer, ids: list[int], thinking: bool) -> None:
    parsed = parse_completion(ids, byte_tokenizer, thinking)
    assert ("the turn was cut off before <|im_end|>" in parsed.errors) == (byte_tokenizer.im_end not in ids)


@given(st.data())
def test_fed_at_once_or_one_by_one_the_message_is_the_same(byte_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Marks, the stray word and pieces of it, characters of several bytes, and any byte at all."""
    t = byte_tokenizer
    marks = "</think>", BEGIN, "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|im_end|>"
    words = [said(t, word) for word in (*marks, "f:0", STRAY, STRAY[:9], " ", "天<")]
    pieces = st.one_of(st.sampled_from(words), st.sampled_from(words), st.integers(0, 319).map(lambda i: [i]))
    ids = [i for piece in data.draw(st.lists(pieces, max_size=12)) for i in piece]
    thinking = data.draw(st.booleans())
    parser = CompletionParser(t, thinking)
    one_by_one = fold([*(event for i in ids for event in parser.feed(i)), *parser.finish()])
    at_once = parse_completion(ids, t, thinking)
    assert fields(at_once.message) == fields(one_by_one.message)
    assert at_once.errors == one_by_one.errors
