"""A caller's choice of a schedule, order or transfer: read strictly, with messages fit for the caller's eyes."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from reprlib import Repr
from typing import Any, TypeVar

Choice = str | Mapping[str, Any]
"""A name, or `{"type": name, ...options}`."""

T = TypeVar("T")


def build(
    noun: str,
    known: Mapping[str, type[T]],
    choice: Choice,
    also: Sequence[str] = (),
    names: Collection[str] | None = None,
) -> T:
    """The frozen config that `choice` names; its dataclass fields are its options.

    `also` names options that the caller has taken out of `choice` already, to be listed as allowed; `names` every name
    that the caller would have taken, where there are more than the known. Raises ValueError: an unknown name lists the
    known ones, an unknown option the allowed ones, a bad value is named with its rule.
    """
    name, options = parse(noun, choice)
    if name not in known:
        raise ValueError(f"unknown {noun} {shown(name)}; known: {', '.join(sorted(names or known))}")
    kind: Any = known[name]
    allowed: tuple[Field[Any], ...] = fields(kind)
    unknown = sorted(shown(key) for key in options if key not in {field.name for field in allowed})
    if unknown:
        listed = ", ".join([*(field.name for field in allowed), *also]) or "none"
        raise ValueError(f"{noun} '{name}' has no option {', '.join(unknown)}; allowed: {listed}")
    missing = [field.name for field in allowed if field.default is MISSING and field.name not in options]
    if missing:
        raise ValueError(f"{noun} '{name}' needs {' and '.join(missing)}")
    try:
        built: T = kind(**options)
    except ValueError as error:
        raise ValueError(f"{noun} '{name}': {error}") from error
    return built


def parse(noun: str, choice: Choice) -> tuple[str, dict[str, Any]]:
    """(name, options) of a choice; raises ValueError where it is neither a name nor an object with a type."""
    if isinstance(choice, str):
        return choice, {}
    if not isinstance(choice, Mapping):
        raise ValueError(f'{noun} must be a name or {{"type": name, ...}}, not {shown(choice)}')
    options = dict(choice)
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise ValueError(f"{noun} must have a type, the name of one, not {shown(name)}")
    return name, options


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float if it is a finite number from `low` to `high`; booleans and strings are none."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            real = float(value)
        except OverflowError:
            real = math.inf
        if math.isfinite(real) and low <= real <= high:
            return real
    raise ValueError(f"{name} must be a finite number{_range(low, high)}, not {shown(value)}")


def integer(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """`value` as an int if it is an integer from `low` to `high`; booleans and whole floats are none."""
    if not isinstance(value, bool) and isinstance(value, Integral) and low <= int(value) <= high:
        return int(value)
    raise ValueError(f"{name} must be an integer{_range(low, high)}, not {shown(value)}")


def shown(value: object) -> str:
    """A value for a message, shortened: what a caller sent may be large."""
    short = Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return "" if math.isinf(low) else f", {low:g} or more"
    return f" from {low:g} to {high:g}"
