"""What a server says when it cannot answer: OpenAI's error objects."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

STATUS_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


LONGEST_MESSAGE, LONGEST_NAME = 1000, 100
"""Characters; clients are told what was wrong, and not all that they sent."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: shortened if it is long, as param is.
        param: the field of the body that is at fault.
        code: OpenAI's word for it, where there is one.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(_shortened(message, LONGEST_MESSAGE))
        self.status = status
        self.param = None if param is None else _shortened(param, LONGEST_NAME)
        self.code = code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, and of the event in a stream."""
        return {
            "error": {
                "message": str(self),
                "type": STATUS_TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, named by its field."""
    errors = error.errors(include_url=False, include_input=False)
    kind = errors[0]["type"]
    if kind in ("json_invalid", "json_type"):
        return ApiError(400, f"the body is not JSON: {errors[0]['msg']}", code="invalid_json")
    if kind in ("model_type", "model_attributes_type") and not errors[0]["loc"]:
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    of_field = [wrong for wrong in errors if wrong["loc"][:1] == errors[0]["loc"][:1]]
    # A field of several types is wrong in the way of each; that which went farthest was meant.
    wrong = max(of_field, key=_distance)
    parts = [*wrong["loc"], *([wrong["ctx"]["field"]] if wrong["type"] == "unknown_field" else [])]
    place = ".".join(
        str(part)
        for before, part in zip(("", *parts), parts, strict=False)
        # Behind text.format comes its type, by which pydantic tells them apart, and no key.
        if not _is_branch(part) and before != "format"
    )
    message = wrong["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, param=place or None)


def _distance(wrong: ErrorDetails) -> tuple[int, ...]:
    """How far a check went until it failed; at the same place, being of another type is nearest."""
    places = [part for part in wrong["loc"] if isinstance(part, int)]
    return (len(wrong["loc"]), *places, not wrong["type"].endswith("_type"))


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "..."


def _is_branch(part: int | str) -> bool:
    """Whether a part of a place is pydantic's name for a type of a union."""
    kinds = ("list[", "dict[", "constrained-")
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool") or part.startswith(kinds)
    )
