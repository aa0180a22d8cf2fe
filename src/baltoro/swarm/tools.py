"""create_subagent and assign_task, the tools that only an orchestrator has (section 3, E.8; schemas in tools.json)."""

import json
from collections.abc import Awaitable, Callable
from importlib.resources import files

from baltoro.agent.tool import CallContext, Tool, ToolResult
from baltoro.agent.trace import Trace
from baltoro.chat.messages import ToolSpec
from baltoro.swarm.critical import critical_steps

RunSubagent = Callable[[str, str, CallContext], Awaitable[Trace]]
"""(system prompt, task, context of the assign_task call) to the finished run."""


def _specs() -> dict[str, ToolSpec]:
    schemas = json.loads(files("baltoro.swarm").joinpath("tools.json").read_text(encoding="utf-8"))
    return {schema["name"]: ToolSpec(schema["name"], schema["description"], schema["parameters"]) for schema in schemas}


_SPECS = _specs()


class CreateSubagent:
    """Registers a configuration. A name stands for a system prompt, not for an agent with a memory."""

    spec = _SPECS["create_subagent"]
    # So that a turn may create an agent and assign it a task.
    sequential = True

    def __init__(self, prompts: dict[str, str]) -> None:
        self._prompts = prompts

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        name, prompt = str(arguments["name"]), str(arguments["system_prompt"])
        if name in self._prompts:
            return ToolResult(error=f'a subagent named "{name}" already exists')
        self._prompts[name] = prompt
        return ToolResult((f"created {name}",))


class AssignTask:
    """Runs a new agent with its own bounded context; only its final message comes back."""

    spec = _SPECS["assign_task"]
    sequential = False

    def __init__(self, prompts: dict[str, str], run: RunSubagent) -> None:
        self._prompts = prompts
        self._run = run

    async def call(self, arguments: dict[str, object], context: CallContext) -> ToolResult:
        name, task = str(arguments["agent"]), str(arguments["prompt"])
        if name not in self._prompts:
            return ToolResult(error=f'there is no subagent named "{name}"')
        # One step stays with the orchestrator, to answer.
        if context.steps_left is not None and context.steps_left < 2:
            return ToolResult(error="no steps are left for a subagent")
        trace = await self._run(self._prompts[name], task, context)
        steps = critical_steps(trace)
        if not trace.final_text:
            return ToolResult((), (trace,), error=unanswered(name, trace.status), steps=steps)
        return ToolResult((trace.final_text,), (trace,), steps=steps)


def unanswered(name: str, status: str) -> str:
    """What the orchestrator is told of a subagent that has no final message."""
    return f"{name} ended without an answer ({status})"


def swarm_tools(run: RunSubagent) -> tuple[Tool, Tool]:
    """The pair for one episode: they share the configurations that the orchestrator creates."""
    prompts: dict[str, str] = {}
    return CreateSubagent(prompts), AssignTask(prompts, run)
