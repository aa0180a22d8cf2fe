"""What crosses the wire: OpenAI's chat completion requests, checked, and errors in OpenAI's form.

A field that would change the answer and is not supported is refused, never ignored.
"""

import json
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class ApiError(Exception):
    """An answer in OpenAI's error form. 4xx: the client's mistake, said in words for its author."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Model):
    type: Literal["text"]
    text: str


class MediaUrl(_Model):
    """`detail` is a hint that has no effect: pictures are seen at their own resolution."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Model):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(_Model):
    type: Literal["video_url"]
    video_url: MediaUrl


AnyPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class FunctionCall(_Model):
    name: str
    arguments: str


class Call(_Model):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemTurn(_Model):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserTurn(_Model):
    role: Literal["user"]
    content: str | list[AnyPart]
    name: str | None = None


class AssistantTurn(_Model):
    """The fields that are always null come with messages that clients send back as they got them."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    name: str | None = None
    parse_errors: list[str] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class ToolTurn(_Model):
    role: Literal["tool"]
    content: str | list[AnyPart]
    tool_call_id: str
    name: str | None = None


AnyTurn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class Function(_Model):
    """`strict` is accepted, for clients send it unasked: arguments are checked, not constrained."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_Model):
    type: Literal["function"]
    function: Function


class StreamOptions(_Model):
    include_usage: bool = False


class TemplateOptions(_Model):
    """`preserve_thinking` keeps the reasoning of finished turns, which the chat template drops."""

    thinking: bool = True
    preserve_thinking: bool = False


class Thinking(_Model):
    type: Literal["enabled", "disabled"]
    keep: Literal["all"] | None = None


class ResponseFormat(_Model):
    type: Literal["text"]


_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class ChatRequest(_Model):
    model: str
    messages: list[AnyTurn] = Field(min_length=1)
    tools: list[FunctionTool] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=128)
    logprobs: bool = False
    top_logprobs: int = 0
    return_token_ids: bool = False
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    # Of no effect on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Admitted only where they ask for nothing.
    response_format: ResponseFormat | None = None
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {k: v for k, v in cast(dict[str, Any], fields).items() if v is not None}

    @field_validator("tool_choice")
    @classmethod
    def _choice(cls, choice: object) -> object:
        if choice not in ("auto", "none"):
            raise ValueError("only auto and none are supported: this server cannot force a call")
        return choice

    @field_validator("top_logprobs")
    @classmethod
    def _alternatives(cls, count: int) -> int:
        if count != 0:
            raise ValueError("alternatives are not supported: leave it at 0, and logprobs gives the sampled tokens'")
        return count

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def thinks(self) -> bool:
        return self.chat_template_kwargs.thinking and not (self.thinking and self.thinking.type == "disabled")

    @property
    def keeps_reasoning(self) -> bool:
        return self.chat_template_kwargs.preserve_thinking or bool(self.thinking and self.thinking.keep)


def read_request(data: bytes) -> ChatRequest:
    """Raises ApiError 400, naming the field and the fault."""
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        # A union reports every arm; the arm that was meant is the one that got furthest.
        worst = max(error.errors(include_url=False), key=lambda e: len(_place(body, e["loc"])))
        place = _place(body, worst["loc"])
        if worst["type"] == "missing":
            place.append(str(worst["loc"][-1]))
        param = ".".join(place)
        raise ApiError(400, f"{param or 'the body'}: {worst['msg']}", param=param or None) from None


def _place(body: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Those parts of pydantic's location that exist in the body: it also names the arms of unions."""
    place: list[str] = []
    for part in loc:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = cast(Any, body)[part]
            place.append(str(part))
    return place


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
