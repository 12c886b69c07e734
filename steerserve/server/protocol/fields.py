"""Types of request fields: strict, finite and bounded, with messages that say what is allowed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_TOKEN_ID = 2**31 - 1
MAX_PROMPTS = 1024
MAX_OPTION_VALUES = 4096
MAX_OPTION_DEPTH = 4
MAX_OPTION_NUMBER = 1e15

TAGS = frozenset({"<text>", "<texts>", "<tokens>", "<token lists>", "<object>", "<name>", "<parts>"})
"""Names of union branches; they show in pydantic's error locations and are no part of a field's path."""


def blame(field: str, message: str) -> PydanticCustomError:
    """The error of a whole-object validator that lays it on one field: the name travels beside the message, since
    pydantic gives such an error the location of the object."""
    return PydanticCustomError("blamed_field", "{message}", {"field": field, "message": message})


class Strict(BaseModel):
    """A JSON object without unknown fields, in which null means left out.

    Numbers are not taken from strings or booleans, nor are NaN and infinity.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data:
            if name not in cls.model_fields:
                raise blame(name or '""', f"is not a known field; known: {', '.join(cls.model_fields)}")
        return {name: value for name, value in data.items() if value is not None}


def _check_option(name: str, value: Any) -> None:
    count = 0
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > MAX_OPTION_VALUES or depth > MAX_OPTION_DEPTH:
            raise ValueError(
                f"option {name!r} may hold {MAX_OPTION_VALUES} values in {MAX_OPTION_DEPTH} levels at most"
            )
        if isinstance(item, int | float) and not abs(item) <= MAX_OPTION_NUMBER:
            raise ValueError(f"option {name!r} may hold finite numbers up to {MAX_OPTION_NUMBER:g} only")
        if isinstance(item, str) and len(item) > 200:
            raise ValueError(f"option {name!r} must hold names of 200 characters at most")
        if isinstance(item, dict):
            waiting.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list):
            waiting.extend((inner, depth + 1) for inner in item)


def _named_options(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("type"), str):
        raise ValueError('must have a "type" that is a string')
    for name, option in value.items():
        _check_option(name, option)
    return value


def branch(by_type: dict[type, str]) -> Callable[[Any], str | None]:
    return lambda value: by_type.get(type(value))


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("must have at least 1 character; leave the prompt out for an unconditional canvas")
    return value


def _prompt_branch(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return {str: "<texts>", int: "<tokens>", list: "<token lists>"}.get(type(first))


# Not compared by value: `typing` would take the annotation of False for that of the equal 0.
@dataclass(frozen=True, eq=False)
class Neutral:
    """Values that ask for nothing, of a field that clients send but that cannot be honoured."""

    allowed: tuple[Any, ...]

    def check(self, value: Any) -> Any:
        """The value; raises ValueError for one that asks for something."""
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.allowed):
            instead = " or send ".join(map(json.dumps, self.allowed))
            raise ValueError(f"is not supported; leave it out{' or send ' * bool(self.allowed)}{instead}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.allowed)}


def neutral(*allowed: Any) -> Neutral:
    """For a field that clients send but that cannot be honoured: only values that ask for nothing pass."""
    return Neutral(allowed)


Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, AfterValidator(_not_empty), WithJsonSchema({"type": "string", "minLength": 1})]
Strength = Annotated[float, Field(ge=-1e6, le=1e6)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Layer = Annotated[int, Field(ge=0, le=10_000)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]

Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
TokenLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]

Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Texts, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[TokenLists, Tag("<token lists>")],
    Discriminator(
        _prompt_branch,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]

Suffix = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Annotated[list[TokenId], Field(fail_fast=True)], Tag("<tokens>")],
    Discriminator(
        branch({str: "<text>", list: "<tokens>"}),
        custom_error_type="suffix",
        custom_error_message="must be a string or a list of token ids",
    ),
]

Stop = Annotated[
    Annotated[StopText, Tag("<text>")] | Annotated[Annotated[list[StopText], Field(max_length=16)], Tag("<texts>")],
    Discriminator(
        branch({str: "<text>", list: "<texts>"}),
        custom_error_type="stop",
        custom_error_message="must be a string or a list of strings",
    ),
]

Options = Annotated[
    dict[Name, Any],
    Field(max_length=32),
    AfterValidator(_named_options),
    WithJsonSchema({"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}),
]

Choice = Annotated[
    Annotated[Name, Tag("<name>")] | Annotated[Options, Tag("<object>")],
    Discriminator(
        branch({str: "<name>", dict: "<object>"}),
        custom_error_type="choice",
        custom_error_message='must be a name or an object {"type": name, ...}',
    ),
]
"""A name, or an object with a `type` and options; the engine knows which names and options there are."""
