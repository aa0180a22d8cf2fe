"""What the gateway answers where it cannot do what was asked; each dialect writes it in its own form."""

from typing import Any, TypeVar, cast

import orjson
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


class ApiError(Exception):
    """4xx: the client's mistake, said in words for its author. retry_after_s: for 429 and 503."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int = 1
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


def read_object(data: bytes) -> dict[str, Any]:
    """A body of JSON. Raises ApiError 400."""
    try:
        body = orjson.loads(data)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return cast(dict[str, Any], body)


def validated(model: type[M], body: dict[str, Any]) -> M:
    """Raises ApiError 400, naming the field and the fault."""
    try:
        return model.model_validate(body)
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
