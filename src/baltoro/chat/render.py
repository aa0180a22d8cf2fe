"""Messages to token ids in the K2.5 chat format (model.md section 11). Control tokens are placed by id and all text is
encoded as ordinary text, so nothing that a user, a tool or a web page says can become a control token."""

from collections.abc import Iterable, Sequence

from baltoro.chat.declare import declare_tools
from baltoro.chat.decode import decode_video
from baltoro.chat.media import MediaSpec, preprocess_clip, preprocess_image
from baltoro.chat.messages import Clip, Image, MediaItem, Message, Part, TokenSequence, ToolSpec, Video
from baltoro.chat.tokenizer import Tokenizer


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    media: MediaSpec,
    tools: Sequence[ToolSpec] = (),
    add_generation_prompt: bool = False,
    keep_reasoning: bool = True,
    thinking: bool = True,
    max_tokens: int | None = None,
) -> TokenSequence:
    """The ids of a dialogue, each picture expanded to one <|media_pad|> per media token.

    keep_reasoning: False is the released chat template: assistant messages up to the last one without tool calls
    (and all of them when not `thinking`) lose their reasoning. True keeps what the model wrote, as training needs it:
    only so is a finished turn a prefix of the next prompt.
    thinking: whether the generation prompt ends in `<think>` or in `<think></think>` (instant mode).

    The loss mask is 1 on what the model itself writes behind the generation prompt, <|im_end|> included. A turn that
    lost its reasoning is no target: the model did not write it so.

    Raises TooLong as soon as there are more than `max_tokens`; what follows is neither decoded nor encoded.
    """
    out = _Writer(tokenizer, media, max_tokens)
    if tools:
        out.header(tokenizer.im_system, "tool_declare")
        out.text(declare_tools(tools))
        out.control(tokenizer.im_end)
    finished = max((i for i, m in enumerate(messages) if m.role == "assistant" and not m.tool_calls), default=-1)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            keep = keep_reasoning or (thinking and i > finished)
            out.assistant(message, message.reasoning if keep else "", thinking)
        else:
            out.message(message)
    if add_generation_prompt:
        out.generation_prompt(thinking)
    return out.sequence()


def render_tool_results(
    messages: Sequence[Message], tokenizer: Tokenizer, media: MediaSpec, thinking: bool = True
) -> TokenSequence:
    """What follows the <|im_end|> of a sampled assistant turn: these messages and the next generation prompt.

    A token-in-token-out loop appends it to the ids as they were sampled (appendix D).
    """
    out = _Writer(tokenizer, media)
    for message in messages:
        out.message(message)
    out.generation_prompt(thinking)
    return out.sequence()


class TooLong(ValueError):
    """The dialogue has more tokens than were allowed."""


class _Writer:
    """Collects ids. Adjacent text is encoded as one piece, as if the whole dialogue were one string."""

    def __init__(self, tokenizer: Tokenizer, spec: MediaSpec, max_tokens: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._max_tokens = max_tokens
        self._pending = ""
        self._target = 0
        self._out = TokenSequence()

    def sequence(self) -> TokenSequence:
        assert not self._pending
        return self._out

    def text(self, text: str) -> None:
        self._pending += text

    def control(self, token: int, target: int = 0, count: int = 1) -> None:
        ids, mask = self._out.ids, self._out.loss_mask
        if self._pending:
            ids += self._tokenizer.encode(self._pending)
            mask += [self._target] * (len(ids) - len(mask))
            self._pending = ""
        if count == 1:
            ids.append(token)
            mask.append(target)
        else:
            ids += [token] * count
            mask += [target] * count
        if self._max_tokens is not None and len(self._out.ids) > self._max_tokens:
            raise TooLong(f"the dialogue has more than {self._max_tokens} tokens")

    def header(self, token: int, name: str) -> None:
        self.control(token)
        self.text(name)
        self.control(self._tokenizer.im_middle)

    def generation_prompt(self, thinking: bool) -> None:
        self.header(self._tokenizer.im_assistant, "assistant")
        self.control(self._tokenizer.think)
        if not thinking:
            self.control(self._tokenizer.end_think)

    def message(self, message: Message) -> None:
        """A turn that is not the model's."""
        self.header(
            self._tokenizer.im_user if message.role == "user" else self._tokenizer.im_system,
            message.name or message.role,
        )
        if message.role == "tool":
            self.text(f"## Return of {message.tool_call_id}\n")
        for part in message.content:
            self._part(part)
        self.control(self._tokenizer.im_end)

    def assistant(self, message: Message, reasoning: str, thinking: bool) -> None:
        t = self._tokenizer
        self.header(t.im_assistant, message.name or "assistant")
        self.control(t.think)
        target = int(reasoning == message.reasoning)
        self._target = target
        self.text(reasoning)
        # In instant mode the prompt itself closes the reasoning.
        self.control(t.end_think, target if thinking or reasoning else 0)
        for part in message.content:
            self._part(part)
        if message.tool_calls:
            self.control(t.tool_calls_section_begin, target)
            for call in message.tool_calls:
                self.control(t.tool_call_begin, target)
                self.text(call.id)
                self.control(t.tool_call_argument_begin, target)
                self.text(call.arguments)
                self.control(t.tool_call_end, target)
            self.control(t.tool_calls_section_end, target)
        self.control(t.im_end, target)
        self._target = 0

    def _part(self, part: Part) -> None:
        match part:
            case str():
                self.text(part)
            case Image():
                self._media("image", preprocess_image(part, self._spec))
                self.text("\n")
            case Clip():
                self._chunks(preprocess_clip(part, self._spec))
            case Video():
                self._chunks(decode_video(part.file, self._spec))

    def _chunks(self, chunks: Iterable[tuple[str, MediaItem]]) -> None:
        for time, chunk in chunks:
            self.text(time)
            self._media("video", chunk)

    def _media(self, kind: str, item: MediaItem) -> None:
        t = self._tokenizer
        self.control(t.media_begin)
        self.text(kind)
        self.control(t.media_content)
        self.control(t.media_pad, count=self._spec.tokens(item.grid_thw))
        self.control(t.media_end)
        self._out.media.append(item)
