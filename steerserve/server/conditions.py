"""Conditions as fields of a request: checked by the engine's own reader, and told in the OpenAPI document."""

from typing import Annotated, Any, Final

from pydantic import AfterValidator, WithJsonSchema

from steerserve.engine.conditions import BOUNDS, parse_condition, parse_remask

_BOUNDS: Final = {name: {"type": "number"} for name in BOUNDS}
_NESTED: Final = {"type": "object", "description": "A condition."}
_LIST: Final = {"type": "array", "items": _NESTED, "minItems": 1}
_FEATURE: Final = {
    "type": "object",
    "properties": {"sae": {"type": "string"}, "index": {"type": "integer", "minimum": 0}},
    "required": ["sae", "index"],
    "additionalProperties": False,
}


def _one(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


_OVER: Final = {"enum": ["mean", "max"]}
CONDITION: Final = {
    "description": "A comparison of what a forward reads of the response, or of progress, or such comparisons joined.",
    "oneOf": [
        _one(
            "attribute",
            attribute={"type": "string"},
            read={"enum": ["projection", "activation"], "default": "projection"},
            over=_OVER | {"default": "mean"},
            **_BOUNDS,
        ),
        _one(
            "feature",
            feature=_FEATURE,
            unit={"enum": ["raw", "max_act"], "default": "raw"},
            over=_OVER | {"default": "max"},
            **_BOUNDS,
        ),
        _one("progress", progress={"type": "object", "properties": _BOUNDS, "additionalProperties": False}),
        _one("all", all=_LIST),
        _one("any", any=_LIST),
        _one("not", **{"not": _NESTED}),
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
    span={"oneOf": [{"enum": ["block", "response"]}, _one("positions", positions=_SPAN)], "default": "block"},
    times={"type": "integer", "minimum": 1, "maximum": 16, "default": 1},
)


def _condition(value: dict[str, Any]) -> dict[str, Any]:
    parse_condition(value)
    return value


def _remask(value: dict[str, Any]) -> dict[str, Any]:
    parse_remask(value)
    return value


Condition = Annotated[dict[str, Any], AfterValidator(_condition), WithJsonSchema(CONDITION)]
Remask = Annotated[dict[str, Any], AfterValidator(_remask), WithJsonSchema(REMASK)]
