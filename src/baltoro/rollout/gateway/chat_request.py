"""OpenAI's chat completion requests, checked: the form to which the other dialects are brought.

A field that would change the answer and is not supported is refused, never ignored.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TOOL_NAME = r"^[A-Za-z0-9_.-]{1,64}$"


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Sparse(Wire):
    """A field that is null is absent: clients send back what they got with every field that they know of."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {k: v for k, v in cast(dict[str, Any], fields).items() if v is not None}


class TextPart(Wire):
    type: Literal["text"]
    text: str


class MediaUrl(Wire):
    """`detail` is a hint that has no effect: pictures are seen at their own resolution."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(Wire):
    type: Literal["video_url"]
    video_url: MediaUrl


AnyPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
Parts = str | list[AnyPart]


class FunctionCall(Wire):
    name: str
    arguments: str


class Call(Wire):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemTurn(Wire):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserTurn(Wire):
    role: Literal["user"]
    content: Parts
    name: str | None = None


class AssistantTurn(Wire):
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


class ToolTurn(Wire):
    role: Literal["tool"]
    content: Parts
    tool_call_id: str
    name: str | None = None


AnyTurn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class Function(Wire):
    """`strict` is accepted, for clients send it unasked: arguments are checked, not constrained."""

    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Wire):
    type: Literal["function"]
    function: Function


class StreamOptions(Wire):
    include_usage: bool = False


class TemplateOptions(Wire):
    """`preserve_thinking` keeps the reasoning of finished turns, which the chat template drops."""

    thinking: bool = True
    preserve_thinking: bool = False


class Thinking(Wire):
    type: Literal["enabled", "disabled"]
    keep: Literal["all"] | None = None


class ResponseFormat(Wire):
    type: Literal["text"]


_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class ChatRequest(Sparse):
    model: str
    messages: list[AnyTurn] = Field(min_length=1)
    tools: list[FunctionTool] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    n: int = Field(default=1, ge=1, le=128)
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
    presence_penalty: float = Field(default=0.0, ge=0, le=0)
    frequency_penalty: float = Field(default=0.0, ge=0, le=0)
    logit_bias: dict[str, Any] | None = Field(default=None, max_length=0)

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
