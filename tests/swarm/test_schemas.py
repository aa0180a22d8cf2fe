"""The two tools as appendix E.8 prints them."""

from typing import Any

from baltoro.agent.tool import CallContext
from baltoro.agent.trace import Trace
from baltoro.swarm.tools import swarm_tools

E8: list[dict[str, Any]] = [
    {
        "name": "create_subagent",
        "description": "Create a custom subagent with specific system prompt and name for reuse.",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "Unique name for this agent configuration"},
                "system_prompt": {
                    "type": "string",
                    "description": "System prompt defining the agent's role, capabilities, and boundaries",
                },
            },
            "required": ["name", "system_prompt"],
        },
    },
    {
        "name": "assign_task",
        "description": "Launch a new agent.\nUsage notes:\n1. You can launch multiple agents concurrently whenever "
        "possible, to maximize performance;\n2. When the agent is done, it will return a single message back to you.",
        "parameters": {
            "type": "object",
            "properties": {
                "agent": {"type": "string", "description": "Specify which created agent to use."},
                "prompt": {"type": "string", "description": "The task for the agent to perform"},
            },
            "required": ["agent", "prompt"],
        },
    },
]


async def never(prompt: str, task: str, context: CallContext) -> Trace:
    raise AssertionError


def test_the_schemas_are_those_of_the_report() -> None:
    specs = [tool.spec for tool in swarm_tools(never)]
    assert [{"name": s.name, "description": s.description, "parameters": s.parameters} for s in specs] == E8
