import pytest

from baltoro.chat.declare import declare_tools
from baltoro.chat.messages import ToolSpec

# Appendix E.8.
CREATE_SUBAGENT = ToolSpec(
    "create_subagent",
    "Create a custom subagent with specific system prompt and name for reuse.",
    {
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
)
ASSIGN_TASK = ToolSpec(
    "assign_task",
    "Launch a new agent.\nUsage notes:\n1. You can launch multiple agents concurrently whenever possible, to maximize "
    "performance;\n2. When the agent is done, it will return a single message back to you.",
    {
        "type": "object",
        "properties": {
            "prompt": {"type": "string", "description": "The task for the agent to perform"},
            "agent": {"type": "string", "description": "Specify which created agent to use."},
        },
        "required": ["agent", "prompt"],
    },
)


def declared(parameters: dict[str, object], description: str = "") -> str:
    """The lines of one function inside its namespace."""
    text = declare_tools([ToolSpec("f", description, parameters)])
    return text.removeprefix("# Tools\n\n## functions\nnamespace functions {\n").removesuffix("\n}\n")


def field(schema: object) -> str:
    """The declaration of one optional field `x`."""
    text = declared({"type": "object", "properties": {"x": schema}})
    return text.removeprefix("type f = (_: {\n").removesuffix("\n}) => any;")


def test_the_two_swarm_tools() -> None:
    assert declare_tools([CREATE_SUBAGENT, ASSIGN_TASK]) == (
        "# Tools\n"
        "\n"
        "## functions\n"
        "namespace functions {\n"
        "// Create a custom subagent with specific system prompt and name for reuse.\n"
        "type create_subagent = (_: {\n"
        "  // Unique name for this agent configuration\n"
        "  name: string,\n"
        "  // System prompt defining the agent's role, capabilities, and boundaries\n"
        "  system_prompt: string\n"
        "}) => any;\n"
        "// Launch a new agent.\n"
        "// Usage notes:\n"
        "// 1. You can launch multiple agents concurrently whenever possible, to maximize performance;\n"
        "// 2. When the agent is done, it will return a single message back to you.\n"
        "type assign_task = (_: {\n"
        "  // Specify which created agent to use.\n"
        "  agent: string,\n"
        "  // The task for the agent to perform\n"
        "  prompt: string\n"
        "}) => any;\n"
        "}\n"
    )


def test_a_rich_schema() -> None:
    parameters: dict[str, object] = {
        "type": "object",
        "properties": {
            "zoom": {"type": ["integer", "null"], "description": "Levels\n\nof detail"},
            "mode": {"enum": ["wide", "deep"], "description": "How to search", "default": "wide"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
            "area": {
                "type": "object",
                "properties": {
                    "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "side": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
                },
                "required": ["side"],
                "additionalProperties": False,
            },
            "pages": {"type": "array", "items": {"type": "integer", "minimum": 1, "description": "From one"}},
        },
        "required": ["zoom", "area"],
    }
    assert declared(parameters, "Look closer.") == (
        "// Look closer.\n"
        "type f = (_: {\n"
        "  area: {\n"
        "    // maximum: 1, minimum: 0\n"
        "    // Default: 0.5\n"
        "    side: number,\n"
        "    unit?: string | null,\n"
        "    [k: string]: never\n"
        "  },\n"
        "  // Levels\n"
        "\n"
        "  // of detail\n"
        "  zoom: number | null,\n"
        "  // How to search\n"
        '  // Default: "wide"\n'
        '  mode?: "wide" | "deep",\n'
        "  pages?: Array<\n"
        "    // From one\n"
        "    // minimum: 1\n"
        "    number\n"
        "  >,\n"
        "  // maxItems: 3, minItems: 1\n"
        "  tags?: Array<string>\n"
        "}) => any;"
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer"}, "  x?: number"),
        ({"type": "boolean", "default": True}, "  // Default: True\n  x?: boolean"),
        ({"type": "number", "default": 0}, "  // Default: 0\n  x?: number"),
        ({"type": "string", "enum": ["a"], "maxLength": 3}, '  x?: "a"'),
        (
            {"type": "array", "items": {"type": "object", "description": "One", "properties": {"a": {}}}},
            "  x?: Array<\n    // One\n    {\n      a?: any\n    }\n  >",
        ),
        ({"type": "string", "default": "é"}, '  // Default: "é"\n  x?: string'),
        ({"type": "string", "minLength": 1, "maxLength": 5}, "  // maxLength: 5, minLength: 1\n  x?: string"),
        ({"type": "object"}, "  x?: {}"),
        ({"type": "object", "default": {"b": 1, "a": 2}}, '  // Default: {"a": 2, "b": 1}\n  x?: {}'),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "  x?: {\n    [k: string]: number\n  }"),
        ({"type": "object", "additionalProperties": True}, "  x?: {\n    [k: string]: any\n  }"),
        ({"type": "array"}, "  x?: Array<any>"),
        ({"type": ["object", "array", "null"]}, "  x?: {} | Array<any> | null"),
        ({"type": "array", "items": {"type": "array", "items": {"enum": [1, "b"]}}}, '  x?: Array<Array<1 | "b">>'),
        ({}, "  x?: any"),
        (True, "  x?: any"),
    ],
)
def test_types(schema: object, text: str) -> None:
    assert field(schema) == text


def test_definitions_and_references_to_the_whole() -> None:
    parameters: dict[str, object] = {
        "type": "object",
        "properties": {"child": {"$ref": "#"}, "at": {"$ref": "#/$defs/Point"}},
        "required": ["at"],
        "$defs": {
            "Point": {
                "type": "object",
                "description": "A place",
                "properties": {"y": {"type": "number"}, "x": {"type": "number"}},
                "required": ["x", "y"],
            }
        },
    }
    assert declared(parameters) == (
        "interface parameters {\n"
        "  at: Point,\n"
        "  child?: parameters\n"
        "}\n"
        "// A place\n"
        "interface Point {\n"
        "  x: number,\n"
        "  y: number\n"
        "}\n"
        "type f = (_: parameters) => any;"
    )


def test_a_tool_without_parameters() -> None:
    assert declared({}) == "type f = (_: {}) => any;"


@pytest.mark.parametrize("schema", [{"oneOf": [{"type": "string"}]}, {"$ref": "#/$defs/none"}, {"$ref": "http://a/b"}])
def test_a_schema_without_typescript_form_is_refused_by_name(schema: object) -> None:
    with pytest.raises(ValueError, match="tool f: "):
        field(schema)
