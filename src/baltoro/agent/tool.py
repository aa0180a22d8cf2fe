"""What an agent can call: a specification the model reads, and a coroutine that answers."""

from dataclasses import dataclass
from typing import Protocol

from baltoro.agent.trace import Trace
from baltoro.chat.messages import Part, ToolSpec


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a tool may know about the call.

    steps_left: critical steps left to the calling agent after the turn that made the call (None: unlimited).
    seed: belongs to this call alone, whatever else runs at the same time.
    origin: the episode's start on the time.monotonic clock.
    """

    steps_left: int | None
    seed: int
    origin: float


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came back. The model sees `content`, or `error` where there is no content.

    children: the agents that the call ran; steps: the critical steps that it took (0 for a direct tool).
    """

    content: tuple[Part, ...] = ()
    children: tuple[Trace, ...] = ()
    error: str = ""
    steps: int = 0

    @property
    def shown(self) -> tuple[Part, ...]:
        return self.content or (f"error: {self.error}" if self.error else "(no output)",)


class Tool(Protocol):
    @property
    def spec(self) -> ToolSpec: ...

    @property
    def sequential(self) -> bool:
        """True: calls of this tool run before the others of their turn, one after another, in the order written."""
        ...

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        """`arguments` satisfy the schema. What the model did wrong is a result with `error`, not an exception."""
        ...
