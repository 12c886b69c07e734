"""Conditions as fields of a request: checked by the engine's own reader, and told in the OpenAPI document."""

from typing import Annotated, Any, Final

from pydantic import AfterValidator, WithJsonSchema

from steerserve.engine.api.conditions import (
    BOUNDS,
    FIELDS,
    MAX_TIMES,
    OVER,
    READ,
    READ_UNITS,
    REMASK_SPANS,
    parse_condition,
    parse_remask,
)

_NULL: Final = {"type": "null"}
_BOUNDS: Final = {name: {"type": ["number", "null"]} for name in BOUNDS}
_NESTED: Final = {"type": "object", "description": "A condition."}
_LIST: Final = {"type": "array", "items": _NESTED, "minItems": 1}
_FEATURE: Final = {
    "type": "object",
    "properties": {"sae": {"type": "string"}, "index": {"type": "integer", "minimum": 0}},
    "required": ["sae", "index"],
    "additionalProperties": False,
}


def _one(required: str, **properties: Any) -> dict[str, Any]:
    """An object with one field that it must have; null is the same as leaving another out."""
    told = {name: one if name == required else {"anyOf": [one, _NULL]} for name, one in properties.items()}
    return {"type": "object", "properties": told, "required": [required], "additionalProperties": False}


def _kind(required: str, **properties: Any) -> dict[str, Any]:
    """A condition of one kind: the fields of the others may be there as null."""
    return _one(required, **dict.fromkeys(FIELDS, _NULL) | properties)


_OVER: Final = {"enum": list(OVER)}
CONDITION: Final = {
    "description": "A comparison of what a forward reads of the response, or of progress, or such comparisons joined.",
    "oneOf": [
        _kind(
            "attribute",
            attribute={"type": "string"},
            read={"enum": list(READ), "default": "projection"},
            over=_OVER | {"default": "mean"},
            **_BOUNDS,
        ),
        _kind(
            "feature",
            feature=_FEATURE,
            unit={"enum": list(READ_UNITS), "default": "raw"},
            over=_OVER | {"default": "max"},
            **_BOUNDS,
        ),
        _kind("progress", progress={"type": "object", "properties": _BOUNDS, "additionalProperties": False}),
        _kind("all", all=_LIST),
        _kind("any", any=_LIST),
        _kind("not", **{"not": _NESTED}),
    ],
}
_SPAN: Final = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 2,
    "maxItems": 2,
}
REMASK: Final = _one(
    "condition",
    condition=CONDITION,
    span={"oneOf": [{"enum": list(REMASK_SPANS)}, _one("positions", positions=_SPAN)], "default": "block"},
    times={"type": "integer", "minimum": 1, "maximum": MAX_TIMES, "default": 1},
)


def _condition(value: dict[str, Any]) -> dict[str, Any]:
    parse_condition(value)
    return value


def _remask(value: dict[str, Any]) -> dict[str, Any]:
    parse_remask(value)
    return value


Condition = Annotated[dict[str, Any], AfterValidator(_condition), WithJsonSchema(CONDITION)]
Remask = Annotated[dict[str, Any], AfterValidator(_remask), WithJsonSchema(REMASK)]
