"""Flags from dataclasses: which types have one, and what is read."""

import argparse
import ast
from pathlib import Path
from typing import Any

import pytest

from steerserve.commands.flags import FlagGroup, type_behind
from steerserve.commands.values import argument_for

ALIASES = {"Unit": "Literal['raw', 'kl']", "Choice": "str | Mapping[str, Any]"}


def lookup(name: str) -> ast.expr | None:
    return ast.parse(ALIASES[name], mode="eval").body if name in ALIASES else None


def read(annotation: str, *given: str) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--field", **argument_for(ast.parse(annotation, mode="eval").body, lookup))
    return parser.parse_args(given).field


@pytest.mark.parametrize(
    ("annotation", "given", "value"),
    [
        ("int", ("--field", "3"), 3),
        ("float", ("--field", "1e-3"), 0.001),
        ("str", ("--field", "a b"), "a b"),
        ("Path", ("--field", "a/b"), Path("a/b")),
        ("bool", ("--field",), True),
        ("bool", ("--no-field",), False),
        ("int | None", ("--field", "3"), 3),
        ("int | None", ("--field", "none"), None),
        ("Unit | None", ("--field", "kl"), "kl"),
        ("Choice", ("--field", "uniform"), "uniform"),
        ("Choice | None", ("--field", '{"type": "window"}'), {"type": "window"}),
        ("str | tuple[int, ...]", ("--field", "text"), "text"),
        ("tuple[int, ...]", ("--field", "1,2"), (1, 2)),
        ("tuple[float, float]", ("--field", "0.5,1"), (0.5, 1.0)),
        ("tuple[str, ...]", ("--field", "a,b", "--field", "c"), ["a,b", "c"]),
        ("tuple[Unit, ...]", ("--field", "raw", "kl"), ["raw", "kl"]),
    ],
)
def test_a_field_is_read_by_its_type(annotation: str, given: tuple[str, ...], value: Any) -> None:
    assert read(annotation, *given) == value


@pytest.mark.parametrize(
    ("annotation", "text"),
    [("int", "1.5"), ("float", "x"), ("Unit", "bar"), ("Choice", "{"), ("tuple[int, ...]", "x")],
)
def test_a_value_of_another_type_is_refused_with_the_value(annotation: str, text: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=f"(?s)--field.*{text}"):
        read(annotation, "--field", text)


def test_a_type_without_a_flag_is_an_error_of_ours() -> None:
    with pytest.raises(TypeError, match="dict"):
        argument_for(ast.parse("dict[str, int]", mode="eval").body, lookup)


def test_fields_come_with_their_defaults_and_the_strings_under_them() -> None:
    fields = {field.name: field for field in FlagGroup("steerserve.config", "ServerConfig").fields()}
    assert (fields["host"].default, fields["host"].help) == ("127.0.0.1", "Address to listen on.")
    skipped = FlagGroup("steerserve.config", "ServerConfig", skip=("host",))
    assert "host" not in {field.name for field in skipped.fields()}


def test_the_type_behind_a_name_is_found_where_it_is_defined() -> None:
    behind = type_behind("steerserve.train.sae", "Policy")
    assert behind is not None
    assert ast.unparse(behind) == "Literal['mask', 'visible']"
    assert type_behind("steerserve.train.sae", "Unheard") is None
