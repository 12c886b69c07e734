"""From the bytes of a body to a validated request, or to one error that names the field."""

import json
import re
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from steerserve.errors import RequestError
from steerserve.server.protocol.fields import TAGS, Strict

Body = TypeVar("Body", bound=Strict)

_SUBJECT = re.compile(r"^(Input|String|List|Dictionary|Value|Data|Object) should\b")
_COUNT = re.compile(r" after validation, not \w+$")


def parse(raw: bytes, shape: type[Body]) -> Body:
    """Parse and validate a JSON body; raises RequestError with the path of the first offending field."""
    return validate(read_object(raw), shape)


def read_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON body that must be an object; raises RequestError."""
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, got {shown(data)}")
    return data


def validate(data: dict[str, Any], shape: type[Body]) -> Body:
    """The object as `shape`; raises RequestError with the path of the first offending field."""
    try:
        return shape.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    raise _blame(details)


def shown(value: Any) -> str:
    """A value as an error message shows it: short, and as JSON."""
    if isinstance(value, dict) and len(value) > 8:
        return f"an object of {len(value)} fields"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)} values"
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 100 else text[:100] + "..."


def _blame(details: list[ErrorDetails]) -> RequestError:
    # A misspelt field first: what else is wrong may well follow from it.
    detail = next((one for one in details if one["type"] == "blamed_field"), details[0])
    path: list[str | int] = [part for part in detail["loc"] if part not in TAGS and part != "[key]"]
    if detail["type"] == "blamed_field":
        param = _path([*path, detail["ctx"]["field"]])
        return RequestError(f"{param} {detail['msg']}", param)
    param = _path(path)
    if detail["type"] == "missing":
        return RequestError(f"{param} is required", param)
    message = _SUBJECT.sub("must", _COUNT.sub("", detail["msg"].removeprefix("Value error, ")))
    return RequestError(f"{param}: {message}, got {shown(detail['input'])}", param)


def _path(parts: list[str | int]) -> str:
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += ("." if path else "") + (part if len(part) <= 100 else part[:100] + "...")
    return path
