"""What a flag accepts, from the annotation of its field; and readers of the values that have a form of their own."""

import argparse
import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Lookup = Callable[[str], ast.expr | None]


def argument_for(annotation: ast.expr, lookup: Lookup) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field of this type; raises TypeError for a type without a flag.

    Known: int, float, str, bool, Path, Literal, `X | None` (the word none gives None), tuple[str, ...] (the flag may
    be repeated), tuple of numbers (commas between them), tuple of Literals (spaces between them), and `str | Mapping`
    (a name or a JSON object). Of any other union with str only the str can be typed. `lookup` gives the type behind
    another name.
    """
    match annotation:
        case ast.Name(id="bool"):
            return {"action": argparse.BooleanOptionalAction}
        case ast.Name(id=name) if name in SCALARS:
            return {"type": SCALARS[name], "metavar": METAVARS[name]}
        case ast.Name(id=name) if (behind := lookup(name)) is not None:
            return argument_for(behind, lookup)
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _optional(argument_for(left, lookup))
        case ast.BinOp(left=ast.Name(id="str"), op=ast.BitOr(), right=ast.Subscript(value=ast.Name(id="Mapping"))):
            return {"type": name_or_object, "metavar": "NAME|JSON"}
        case ast.BinOp(left=ast.Name(id="str"), op=ast.BitOr()):
            return argument_for(annotation.left, lookup)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            options = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return {"choices": [option.value for option in options if isinstance(option, ast.Constant)]}
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[ast.Name(id="str"), _])):
            return {"action": "append", "metavar": "TEXT"}
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[element, *_])):
            one = argument_for(element, lookup)
            if "choices" in one:
                return one | {"nargs": "+"}
            return {"type": _commas(one["type"]), "metavar": f"{one['metavar']},..."}
        case _:
            raise TypeError(f"no flag can be made of a field of type {ast.unparse(annotation)}")


def name_or_object(text: str) -> str | dict[str, Any]:
    """A name as it is, or a JSON object such as {"type": "window", "start": 0, "stop": 0.5}."""
    if not text.startswith("{"):
        return text
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a JSON object: {text} ({error})") from error
    if "type" not in parsed:
        raise argparse.ArgumentTypeError(f"the object needs a type: {text}")
    return dict(parsed)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a whole number: {text!r}") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from error


def _optional(argument: dict[str, Any]) -> dict[str, Any]:
    read = argument.get("type")
    return argument if read is None else argument | {"type": lambda text: None if text == "none" else read(text)}


def _commas(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(read(part) for part in text.split(","))


SCALARS: Mapping[str, Callable[[str], Any]] = {"int": _integer, "float": _number, "str": str, "Path": Path}
METAVARS: Mapping[str, str] = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}

layer_list = _commas(_integer)
"""Layers with commas between them: 2,3,4."""
