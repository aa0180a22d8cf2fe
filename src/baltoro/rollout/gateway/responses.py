"""OpenAI's responses. Nothing is kept under a response's id: the whole dialogue comes with every request."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator

from baltoro.chat.messages import ToolCall
from baltoro.rollout.gateway.answer import Choice, Job, Step
from baltoro.rollout.gateway.blocks import Begun, Blocks, Called, Delta, Ended
from baltoro.rollout.gateway.chat import Chat
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


class _InputText(Wire):
    type: Literal["input_text"]
    text: str


class _InputImage(Sparse):
    """`detail` has no effect, as in chat completions."""

    type: Literal["input_image"]
    image_url: str
    detail: str | None = None


class _OutputText(Sparse):
    type: Literal["output_text"]
    text: str
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None


_Input = Annotated[_InputText | _InputImage, Field(discriminator="type")]


class _Item(Sparse):
    """What an output item bears when a client sends it back."""

    id: str | None = None
    status: str | None = None


class _Message(_Item):
    type: Literal["message"]
    role: Literal["system", "developer", "user"]
    content: str | list[_Input]


class _Answer(_Item):
    type: Literal["message"]
    role: Literal["assistant"]
    content: str | list[_OutputText]
    phase: Any = None


class _Call(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Any = None
    caller: Any = None


class _Result(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[_Input]


class _Thought(Wire):
    type: Literal["reasoning_text"]
    text: str


class _Reasoning(_Item):
    type: Literal["reasoning"]
    summary: list[Any] = Field(default=[])
    content: list[_Thought] | None = None


_AnyItem = _Message | _Answer | _Call | _Result | _Reasoning


class _Tool(Wire):
    """`strict` as in chat completions."""

    type: Literal["function"]
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Effort(Wire):
    effort: str | None = None
    summary: str | None = None


class _Format(Wire):
    type: Literal["text"]


class _TextOptions(Wire):
    format: _Format | None = None
    verbosity: str | None = None


class _Request(Sparse):
    model: str
    input: str | Annotated[list[_AnyItem], Field(min_length=1)]
    instructions: str | None = None
    tools: list[_Tool] = Field(default=[])
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    reasoning: _Effort | None = None
    text: _TextOptions | None = None
    stream: bool = False
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    # Of no effect on the answer.
    store: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    stream_options: Any = None

    @field_validator("tool_choice")
    @classmethod
    def _choice(cls, choice: object) -> object:
        if choice not in ("auto", "none"):
            raise ValueError("only auto and none are supported: this server cannot force a call")
        return choice


class Responses:
    name = "responses"

    def read(self, body: dict[str, Any]) -> ChatRequest:
        items = body.get("input")
        if isinstance(items, list):  # a message may come without its type
            body = {**body, "input": [_typed(item) for item in cast(list[Any], items)]}
        asked = validated(_Request, body)
        turns: list[AnyTurn] = [SystemTurn(role="system", content=asked.instructions)] if asked.instructions else []
        if isinstance(asked.input, str):
            turns.append(UserTurn(role="user", content=asked.input))
        else:
            turns += _turns(asked.input)
        functions = [Function(name=t.name, description=t.description, parameters=t.parameters) for t in asked.tools]
        off = asked.reasoning is not None and asked.reasoning.effort == "none"
        return ChatRequest(
            model=asked.model,
            messages=turns,
            tools=[FunctionTool(type="function", function=function) for function in functions],
            tool_choice=asked.tool_choice,
            parallel_tool_calls=asked.parallel_tool_calls,
            stream=asked.stream,
            max_tokens=asked.max_output_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            thinking=Thinking(type="disabled" if off else "enabled"),
        )

    def whole(self, request: ChatRequest, job: Job, choices: Sequence[Choice], spell: Spell) -> dict[str, Any]:
        choice = choices[0]
        said = choice.message
        output: list[dict[str, Any]] = []
        if said.reasoning:
            output.append(_reasoning(said.reasoning))
        if said.text:
            output.append(_text(said.text))
        output += [_call(call) for call in said.tool_calls]
        return _response(request, job, output, choice)

    def stream(self, request: ChatRequest, job: Job, spell: Spell) -> "ResponsesStream":
        return ResponsesStream(request, job)

    def error(self, error: ApiError) -> dict[str, Any]:
        return Chat().error(error)


class ResponsesStream:
    def __init__(self, request: ChatRequest, job: Job) -> None:
        self._request = request
        self._job = job
        self._response = _response(request, job, [], None)
        self._blocks = Blocks()
        self._output: list[dict[str, Any]] = []
        self._sent = 0

    def step(self, choice: Choice, step: Step) -> bytes:
        told = b""
        if not self._sent:
            told = self._event("created", response=self._response) + self._event("in_progress", response=self._response)
        events = self._blocks.feed(step.events) + (self._blocks.end() if step.finish else [])
        return told + b"".join(self._block(one) for one in events)

    def end(self, choices: Sequence[Choice]) -> bytes:
        whole = {**_response(self._request, self._job, self._output, choices[0]), "id": self._response["id"]}
        return self._event(str(whole["status"]), response=whole)

    def error(self, body: dict[str, Any]) -> bytes:
        fault = body["error"]
        return self._send("error", code=fault["code"], message=fault["message"], param=fault["param"])

    def _block(self, told: Begun | Delta | Ended | Called) -> bytes:
        index = told.index
        match told:
            case Begun(_, kind):
                item = _reasoning("") if kind == "reasoning" else _text("")
                part = item["content"][0]
                item.update(content=[], status="in_progress")
                self._output.append(item)
                where = {"item_id": item["id"], "output_index": index, "content_index": 0}
                added = self._event("output_item.added", output_index=index, item=item)
                return added + self._event("content_part.added", part=part, **where)
            case Delta(_, kind, text):
                where = {"item_id": self._output[index]["id"], "output_index": index, "content_index": 0}
                more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
                return self._event(f"{_NAMES[kind]}.delta", delta=text, **where, **more)
            case Ended(_, kind, text):
                item = _reasoning(text) if kind == "reasoning" else _text(text)
                item["id"] = self._output[index]["id"]
                self._output[index] = item
                where = {"item_id": item["id"], "output_index": index, "content_index": 0}
                more = {} if kind == "reasoning" else {"logprobs": []}
                return (
                    self._event(f"{_NAMES[kind]}.done", text=text, **where, **more)
                    + self._event("content_part.done", part=item["content"][0], **where)
                    + self._event("output_item.done", output_index=index, item=item)
                )
            case Called(_, call):
                item = _call(call)
                self._output.append(item)
                where = {"item_id": item["id"], "output_index": index}
                begun = {**item, "arguments": "", "status": "in_progress"}
                return (
                    self._event("output_item.added", output_index=index, item=begun)
                    + self._event("function_call_arguments.delta", delta=call.arguments, **where)
                    + self._event("function_call_arguments.done", arguments=call.arguments, name=call.name, **where)
                    + self._event("output_item.done", output_index=index, item=item)
                )

    def _event(self, kind: str, **fields: Any) -> bytes:
        return self._send(f"response.{kind}", **fields)

    def _send(self, kind: str, **fields: Any) -> bytes:
        self._sent += 1
        return event({"type": kind, "sequence_number": self._sent - 1, **fields}, kind)


_NAMES = {"reasoning": "reasoning_text", "text": "output_text"}


def _typed(item: Any) -> Any:
    return {"type": "message", **cast(dict[str, Any], item)} if isinstance(item, dict) else item


def _turns(items: Sequence[_AnyItem]) -> list[AnyTurn]:
    """The items of one answer, which follow each other, are one message in the chat format."""
    turns: list[AnyTurn] = []
    answer: list[_Answer | _Call | _Reasoning] = []

    def close() -> None:
        if answer:
            turns.append(_assistant(answer))
            answer.clear()

    for item in items:
        match item:
            case _Message():
                close()
                turns.append(_message(item))
            case _Result():
                close()
                turns.append(ToolTurn(role="tool", content=_content(item.output), tool_call_id=item.call_id))
            case _:
                answer.append(item)
    close()
    return turns


def _assistant(items: Sequence[_Answer | _Call | _Reasoning]) -> AssistantTurn:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Call] = []
    for item in items:
        match item:
            case _Answer():
                texts += [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
            case _Reasoning():
                thoughts += [part.text for part in item.content or ()]
            case _Call():
                calls.append(Call(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments)))
    return AssistantTurn(
        role="assistant", content="".join(texts), reasoning_content="".join(thoughts), tool_calls=calls
    )


def _message(item: _Message) -> AnyTurn:
    content = _content(item.content)
    if item.role == "user":
        return UserTurn(role="user", content=content)
    if isinstance(content, str):
        return SystemTurn(role=item.role, content=content)
    if any(not isinstance(part, TextPart) for part in content):
        raise ApiError(400, f"a {item.role} message may hold text only", param="input")
    return SystemTurn(role=item.role, content=[part for part in content if isinstance(part, TextPart)])


def _content(content: str | Sequence[_InputText | _InputImage]) -> Parts:
    if isinstance(content, str):
        return content
    parts: list[AnyPart] = []
    for part in content:
        if isinstance(part, _InputText):
            parts.append(TextPart(type="text", text=part.text))
        else:
            parts.append(ImagePart(type="image_url", image_url=MediaUrl(url=part.image_url)))
    return parts


def _response(request: ChatRequest, job: Job, output: list[dict[str, Any]], choice: Choice | None) -> dict[str, Any]:
    """Without `choice`: as it stands at the beginning."""
    cut = choice is not None and choice.finish == "length"
    body: dict[str, Any] = {
        "id": f"resp_{fresh()}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress" if choice is None else "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": {},
        "model": job.model,
        "output": output,
        "parallel_tool_calls": request.parallel_tool_calls,
        "temperature": request.temperature,
        "tool_choice": request.tool_choice,
        "tools": [
            {
                "type": "function",
                "name": t.name,
                "description": t.description,
                "parameters": t.parameters,
                "strict": None,
            }
            for t in job.tools
        ],
        "top_p": request.top_p,
        "usage": None,
    }
    if choice is not None:
        read, drawn = len(job.read), len(choice.drawn.ids)
        body["usage"] = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": drawn,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + drawn,
        }
        if errors := choice.errors():
            body["parse_errors"] = errors
    return body


def _reasoning(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": f"rs_{fresh()}", "summary": [], "content": content}


def _text(text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
    head = {"type": "message", "id": f"msg_{fresh()}", "role": "assistant", "status": "completed"}
    return {**head, "content": [part]}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{fresh()}",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }
