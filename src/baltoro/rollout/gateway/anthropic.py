"""Anthropic's messages."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from baltoro.chat.messages import ToolCall
from baltoro.rollout.gateway.answer import Choice, Job, Step
from baltoro.rollout.gateway.blocks import Begun, Blocks, Called, Delta, Ended
from baltoro.rollout.gateway.chat_request import (
    TOOL_NAME,
    AnyPart,
    AnyTurn,
    AssistantTurn,
    Call,
    ChatRequest,
    Function,
    FunctionCall,
    FunctionTool,
    ImagePart,
    MediaUrl,
    Parts,
    Sparse,
    SystemTurn,
    TextPart,
    Thinking,
    ToolTurn,
    UserTurn,
    Wire,
)
from baltoro.rollout.gateway.dialect import Spell, event, fresh
from baltoro.rollout.gateway.errors import ApiError, validated


class _Block(Sparse):
    """`cache_control` is a hint that has no effect: what was read is cached anyway."""

    cache_control: Any = None


class _Text(_Block):
    type: Literal["text"]
    text: str


class _Source(Wire):
    type: Literal["base64"]
    media_type: str
    data: str


class _Image(_Block):
    type: Literal["image"]
    source: _Source


class _Thought(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class _ToolUse(_Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


class _ToolResult(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[_Text | _Image, Field(discriminator="type")]] = ""
    is_error: bool | None = None


_UserBlock = Annotated[_Text | _Image | _ToolResult, Field(discriminator="type")]
_AssistantBlock = Annotated[_Text | _Thought | _ToolUse, Field(discriminator="type")]


class _User(Wire):
    role: Literal["user"]
    content: str | list[_UserBlock]


class _Assistant(Wire):
    role: Literal["assistant"]
    content: str | list[_AssistantBlock]


class _Tool(_Block):
    type: Literal["custom"] = "custom"
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class _ToolChoice(Wire):
    type: str
    disable_parallel_tool_use: bool = False

    @field_validator("type")
    @classmethod
    def _choice(cls, choice: str) -> str:
        if choice not in ("auto", "none"):
            raise ValueError("only auto and none are supported: this server cannot force a call")
        return choice


class _Thinking(Wire):
    """The budget is not enforced; max_tokens is."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Any = None


class _Request(Sparse):
    model: str
    messages: list[Annotated[_User | _Assistant, Field(discriminator="role")]] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    system: str | list[_Text] = ""
    tools: list[_Tool] = Field(default=[])
    tool_choice: _ToolChoice | None = None
    thinking: _Thinking | None = None
    temperature: float = Field(default=1.0, ge=0, le=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(default=[], max_length=16)
    stream: bool = False
    # Of no effect on the answer.
    metadata: Any = None
    service_tier: str | None = None
    cache_control: Any = None


class Anthropic:
    name = "anthropic"

    def read(self, body: dict[str, Any]) -> ChatRequest:
        asked = validated(_Request, body)
        turns: list[AnyTurn] = []
        system = "".join(_texts(asked.system))
        if system:
            turns.append(SystemTurn(role="system", content=system))
        for message in asked.messages:
            turns += _user(message) if isinstance(message, _User) else [_assistant(message)]
        choice = asked.tool_choice
        off = asked.thinking is not None and asked.thinking.type == "disabled"
        functions = [Function(name=t.name, description=t.description, parameters=t.input_schema) for t in asked.tools]
        return ChatRequest(
            model=asked.model,
            messages=turns,
            tools=[FunctionTool(type="function", function=function) for function in functions],
            tool_choice=choice.type if choice else "auto",
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            stream=asked.stream,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop=asked.stop_sequences,
            thinking=Thinking(type="disabled" if off else "enabled"),
        )

    def whole(self, request: ChatRequest, job: Job, choices: Sequence[Choice], spell: Spell) -> dict[str, Any]:
        choice = choices[0]
        said = choice.message
        content: list[dict[str, Any]] = []
        if said.reasoning:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.text:
            content.append({"type": "text", "text": said.text})
        content += [_tool_use(call) for call in said.tool_calls]
        usage = {**_usage(job), "output_tokens": len(choice.drawn.ids)}
        return {**_message(job), "content": content, **_stop(choice), "usage": usage, **_faults(choice)}

    def stream(self, request: ChatRequest, job: Job, spell: Spell) -> "AnthropicStream":
        return AnthropicStream(job)

    def error(self, error: ApiError) -> dict[str, Any]:
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error",
            503: "overloaded_error",
        }
        default = "api_error" if error.status >= 500 else "invalid_request_error"
        return {"type": "error", "error": {"type": kinds.get(error.status, default), "message": error.message}}


class AnthropicStream:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._blocks = Blocks()
        self._opened = False

    def step(self, choice: Choice, step: Step) -> bytes:
        told = b""
        if not self._opened:
            self._opened = True
            message: dict[str, Any] = {**_message(self._job), "content": [], "stop_reason": None, "stop_sequence": None}
            usage = {**_usage(self._job), "output_tokens": 0}
            told = _event({"type": "message_start", "message": {**message, "usage": usage}})
        for one in self._blocks.feed(step.events):
            told += self._block(one)
        if not step.finish:
            return told
        for one in self._blocks.end():
            told += self._block(one)
        usage = {"output_tokens": len(choice.drawn.ids)}
        return told + _event({"type": "message_delta", "delta": {**_stop(choice), **_faults(choice)}, "usage": usage})

    def end(self, choices: Sequence[Choice]) -> bytes:
        return _event({"type": "message_stop"})

    def error(self, body: dict[str, Any]) -> bytes:
        return _event(body)

    def _block(self, told: Begun | Delta | Ended | Called) -> bytes:
        match told:
            case Begun(index, "text"):
                return _start(index, {"type": "text", "text": ""})
            case Begun(index, _):
                return _start(index, {"type": "thinking", "thinking": "", "signature": ""})
            case Delta(index, "text", text):
                return _delta(index, {"type": "text_delta", "text": text})
            case Delta(index, _, text):
                return _delta(index, {"type": "thinking_delta", "thinking": text})
            case Ended(index, _, _):
                return _event({"type": "content_block_stop", "index": index})
            case Called(index, call):
                use = _tool_use(call)
                return (
                    _start(index, {**use, "input": {}})
                    + _delta(index, {"type": "input_json_delta", "partial_json": json.dumps(use["input"])})
                    + _event({"type": "content_block_stop", "index": index})
                )


def _user(message: _User) -> list[AnyTurn]:
    """Tool results are messages of their own in the chat format; what stands between them stays in its order."""
    if isinstance(message.content, str):
        return [UserTurn(role="user", content=message.content)]
    turns: list[AnyTurn] = []
    parts: list[AnyPart] = []

    def close() -> None:
        if parts:
            turns.append(UserTurn(role="user", content=list(parts)))
            parts.clear()

    for block in message.content:
        if isinstance(block, _ToolResult):
            close()
            content: Parts = block.content if isinstance(block.content, str) else [_part(one) for one in block.content]
            turns.append(ToolTurn(role="tool", content=content, tool_call_id=block.tool_use_id))
        else:
            parts.append(_part(block))
    close()
    return turns


def _assistant(message: _Assistant) -> AssistantTurn:
    if isinstance(message.content, str):
        return AssistantTurn(role="assistant", content=message.content)
    calls = [
        Call(id=block.id, function=FunctionCall(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)))
        for block in message.content
        if isinstance(block, _ToolUse)
    ]
    return AssistantTurn(
        role="assistant",
        content="".join(block.text for block in message.content if isinstance(block, _Text)),
        reasoning_content="".join(block.thinking for block in message.content if isinstance(block, _Thought)),
        tool_calls=calls,
    )


def _part(block: _Text | _Image) -> TextPart | ImagePart:
    if isinstance(block, _Text):
        return TextPart(type="text", text=block.text)
    url = f"data:{block.source.media_type};base64,{block.source.data}"
    return ImagePart(type="image_url", image_url=MediaUrl(url=url))


def _texts(system: str | list[_Text]) -> list[str]:
    return [system] if isinstance(system, str) else [block.text for block in system]


def _message(job: Job) -> dict[str, Any]:
    return {"id": f"msg_{fresh()}", "type": "message", "role": "assistant", "model": job.model}


def _usage(job: Job) -> dict[str, Any]:
    return {"input_tokens": len(job.read)}


def _tool_use(call: ToolCall) -> dict[str, Any]:
    """This dialect has no form for arguments that are no JSON object: they become the empty one."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = {}
    return {
        "type": "tool_use",
        "id": call.id,
        "name": call.name,
        "input": arguments if isinstance(arguments, dict) else {},
    }


def _stop(choice: Choice) -> dict[str, Any]:
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    reason = "stop_sequence" if choice.stop else reasons[choice.finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": choice.stop or None}


def _faults(choice: Choice) -> dict[str, Any]:
    errors = choice.errors()
    return {"parse_errors": errors} if errors else {}


def _start(index: int, block: dict[str, Any]) -> bytes:
    return _event({"type": "content_block_start", "index": index, "content_block": block})


def _delta(index: int, delta: dict[str, Any]) -> bytes:
    return _event({"type": "content_block_delta", "index": index, "delta": delta})


def _event(body: dict[str, Any]) -> bytes:
    return event(body, body["type"])
