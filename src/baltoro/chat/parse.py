"""From sampled ids back to a message, token by token (model.md sections 3.10, 11). Structure is read from control ids
alone, so text that spells a marker stays text; what a model got wrong is reported, never raised."""

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baltoro.chat.messages import Message, ToolCall, assistant
from baltoro.chat.tokenizer import Tokenizer

_CALL_ID = re.compile(r"[^<]+:[0-9]+")
# Models write this word, which is no token, in place of <|tool_calls_section_begin|>.
_STRAY_BEGIN = "<|tool_call_section_begin|>"
_STRAY_END = "<|tool_call_section_end|>"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """`id` as the model wrote it; `name` is the tool's."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """Belongs to the call that began last."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call that began last is whole."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """What was wrong, in words that quote it. A call that has begun and not ended is void."""

    error: str


Event = ReasoningDelta | ContentDelta | CallBegun | ArgumentsDelta | CallEnded | Malformed


@dataclass(frozen=True, slots=True)
class Parsed:
    """`errors` says in words what was wrong; each malformed call is quoted there and absent from the message."""

    message: Message
    errors: tuple[str, ...] = ()


def parse_completion(ids: Sequence[int], tokenizer: Tokenizer, thinking: bool = True) -> Parsed:
    """Reads what follows the generation prompt; `thinking` says which of the two prompts it was.

    Arguments come back exactly as written: whether they are JSON and fit the schema is for the tool's caller.
    """
    parser = CompletionParser(tokenizer, thinking)
    return fold([*parser.feed_all(ids), *parser.finish()])


def fold(events: Iterable[Event]) -> Parsed:
    """The message that the events of one turn tell."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    errors: list[str] = []
    begun = CallBegun("", "")
    arguments: list[str] = []
    for event in events:
        match event:  # without sub-patterns, which cost more than all the rest
            case ReasoningDelta():
                reasoning.append(event.text)
            case ContentDelta():
                content.append(event.text)
            case CallBegun():
                begun, arguments = event, []
            case ArgumentsDelta():
                arguments.append(event.text)
            case CallEnded():
                calls.append(ToolCall(begun.id, begun.name, "".join(arguments)))
            case Malformed():
                errors.append(event.error)
    message = assistant("".join(content), reasoning="".join(reasoning), tool_calls=tuple(calls))
    return Parsed(message, tuple(errors))


class CompletionParser:
    """Fed every token that follows the generation prompt, it tells what each adds to the message.

    Deltas end between characters, whatever bytes a token holds; bytes that are no UTF-8 become U+FFFD. Content is held
    back only while it may turn out to be the word that models write for the begin of a tool section.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool = True) -> None:
        """`thinking` says which of the two generation prompts it was."""
        self._tokenizer = tokenizer
        self._read = self._reasoning if thinking else self._content
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._halved = False  # the decoder holds the first bytes of a character
        self._stray = ""  # the end of the content that is the stray word, or the beginning of it
        self._blank: list[str] = []  # white space behind the whole stray word
        # In the tool section: what stands since the last border, and how far it was understood as a call.
        self._piece: list[int] = []
        self._in_call = False
        self._has_arguments = False
        self._begun = False
        t = tokenizer
        self._marks = {t.im_end, t.end_think, t.tool_calls_section_begin, t.tool_calls_section_end}
        self._marks |= {t.tool_call_begin, t.tool_call_argument_begin, t.tool_call_end}

    def feed(self, token: int) -> list[Event]:
        """What follows the end of the turn is not read."""
        if token == self._tokenizer.im_end:
            return self._end()
        return self._read([token])

    def feed_all(self, tokens: Sequence[int]) -> list[Event]:
        """As `feed` for each, with longer deltas: what stands between two marks is decoded at once."""
        events: list[Event] = []
        done = 0
        for place in [i for i, token in enumerate(tokens) if token in self._marks]:
            if place > done:
                events += self._read(tokens[done:place])
            events += self.feed(tokens[place])
            done = place + 1
        return events + self._read(tokens[done:]) if done < len(tokens) else events

    def finish(self) -> list[Event]:
        """No more tokens will come. A turn without <|im_end|> was cut off."""
        if self._read == self._nothing:
            return []
        return [*self._end(), Malformed("the turn was cut off before <|im_end|>")]

    def _end(self) -> list[Event]:
        read, self._read = self._read, self._nothing
        if read == self._reasoning:
            return [*_texts(ReasoningDelta, self._rest()), Malformed("the reasoning has no </think>")]
        if read == self._content:
            return _texts(ContentDelta, self._sure(self._rest()) + self._unsure())
        return self._end_piece(closed=False) if read == self._section else []

    # The readers take one mark, or a run of other tokens.

    def _nothing(self, run: Sequence[int]) -> list[Event]:
        return []

    def _reasoning(self, run: Sequence[int]) -> list[Event]:
        if run[0] == self._tokenizer.end_think:
            self._read = self._content
            return _texts(ReasoningDelta, self._rest())
        return _texts(ReasoningDelta, self._decode(run))

    def _content(self, run: Sequence[int]) -> list[Event]:
        t, token = self._tokenizer, run[0]
        if token not in (t.tool_calls_section_begin, t.tool_call_begin):
            return _texts(ContentDelta, self._sure(self._decode(run)))
        self._read = self._section
        self._in_call = token == t.tool_call_begin
        text = self._sure(self._rest())
        if self._in_call and self._stray == _STRAY_BEGIN:
            return _texts(ContentDelta, text)
        return _texts(ContentDelta, text + self._unsure())

    def _section(self, run: Sequence[int]) -> list[Event]:
        t, token = self._tokenizer, run[0]
        if token in (t.tool_call_begin, t.tool_call_end, t.tool_calls_section_end):
            events = self._end_piece(closed=token == t.tool_call_end)
            self._in_call = token == t.tool_call_begin
            return events
        if self._in_call and token == t.tool_call_argument_begin and not self._has_arguments:
            self._has_arguments = True
            call_id = t.decode(self._piece).strip()
            self._piece.append(token)
            self._begun = bool(_CALL_ID.fullmatch(call_id))
            return [CallBegun(call_id, call_id.removeprefix("functions.").rpartition(":")[0])] if self._begun else []
        self._piece += run
        return _texts(ArgumentsDelta, self._decode(run)) if self._begun else []

    def _end_piece(self, closed: bool) -> list[Event]:
        """A border of the tool section, or the end of the turn."""
        if not self._piece and not self._in_call:
            return []
        rest = self._rest()
        piece, in_call, has_arguments, begun = self._piece, self._in_call, self._has_arguments, self._begun
        self._piece, self._in_call, self._has_arguments, self._begun = [], False, False, False
        if begun and closed:
            return [*_texts(ArgumentsDelta, rest), CallEnded()]
        quoted = self._tokenizer.decode(piece)
        if not in_call:
            fine = quoted.strip() in ("", _STRAY_END)
            return [] if fine else [Malformed(f"text outside a tool call in the tool section: {quoted.strip()}")]
        if not has_arguments:
            return [Malformed(f"a tool call has no arguments: {quoted}")]
        if not begun:
            return [Malformed(f"a tool call's id is not of the form functions.name:index: {quoted}")]
        return [Malformed(f"a tool call was not closed: {quoted}")]

    def _decode(self, run: Sequence[int]) -> str:
        data = self._tokenizer.decode_bytes(run)
        if not self._halved:
            try:
                return data.decode()
            except UnicodeDecodeError:
                pass
        text = self._utf8.decode(data)
        self._halved = bool(self._utf8.getstate()[0])
        return text

    def _rest(self) -> str:
        """A character that was not completed, as U+FFFD."""
        if not self._halved:
            return ""
        self._halved = False
        return self._utf8.decode(b"", final=True)

    def _sure(self, text: str) -> str:
        """What is content now that `text` has come; the rest is held back."""
        if self._stray == _STRAY_BEGIN and not text.strip():
            self._blank.append(text)
            return ""
        text = self._unsure() + text
        whole = text.rstrip()
        if whole.endswith(_STRAY_BEGIN):
            self._stray, self._blank = _STRAY_BEGIN, [text[len(whole) :]]
            return whole.removesuffix(_STRAY_BEGIN)
        begin = text.find(_STRAY_BEGIN[0], -len(_STRAY_BEGIN))
        while begin >= 0 and not _STRAY_BEGIN.startswith(text[begin:]):
            begin = text.find(_STRAY_BEGIN[0], begin + 1)
        self._stray = text[begin:] if begin >= 0 else ""
        return text.removesuffix(self._stray)

    def _unsure(self) -> str:
        text = self._stray + "".join(self._blank)
        self._stray, self._blank = "", []
        return text


def _texts(kind: type[ReasoningDelta | ContentDelta | ArgumentsDelta], text: str) -> list[Event]:
    return [kind(text)] if text else []
