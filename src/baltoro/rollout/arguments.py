"""Arguments by chance, for players that do not know what a tool is for."""

import math
import random
from typing import Any, cast


def some_arguments(parameters: dict[str, object], rng: random.Random) -> dict[str, Any]:
    """Something that satisfies a tool's schema; patterns are not looked at."""
    return _value(parameters, rng, parameters)


def _value(schema: Any, rng: random.Random, root: Any) -> Any:
    if not isinstance(schema, dict) or not schema:
        return "x"
    below = cast(dict[str, Any], schema)
    if "$ref" in below:
        return _value(root["$defs"][str(below["$ref"]).rpartition("/")[2]], rng, root)
    if "enum" in below:
        return rng.choice(below["enum"])
    if "anyOf" in below:
        return _value(rng.choice(below["anyOf"]), rng, root)
    kinds: Any = below.get("type", "object")
    kind = rng.choice(cast(list[str], kinds)) if isinstance(kinds, list) else str(kinds)
    match kind:
        case "object":
            required = below.get("required", ())
            return {
                name: _value(value, rng, root)
                for name, value in below.get("properties", {}).items()
                if name in required or rng.random() < 0.5
            }
        case "array":
            low = below.get("minItems", 0)
            return [
                _value(below.get("items"), rng, root) for _ in range(rng.randint(low, below.get("maxItems", low + 2)))
            ]
        case "integer":
            low = math.ceil(below.get("minimum", 0))
            return rng.randint(low, math.floor(below.get("maximum", low + 100)))
        case "number":
            low = below.get("minimum", 0.0)
            return rng.uniform(low, below.get("maximum", low + 1.0))
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
        case _:
            return "x" * max(1, below.get("minLength", 0))
