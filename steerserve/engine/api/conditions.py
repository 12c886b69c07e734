"""Conditions on what a step read: their JSON, read strictly, and whether they hold. Free of torch.

{"attribute": "topic/sports", "above": 0.4}                     {"all": [condition, ...]}
{"feature": {"sae": "layer-4-mask", "index": 7}, "above": 2}    {"any": [condition, ...]}
{"progress": {"at_least": 0.2, "below": 0.6}}                   {"not": condition}
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

MAX_DEPTH: Final = 8
"""Levels of a condition."""
MAX_COMPARISONS: Final = 32
"""Comparisons in one condition."""
MAX_NUMBER: Final = 1e9
BOUNDS: Final = ("above", "at_least", "below", "at_most")
KINDS: Final = ("all", "any", "not", "progress", "attribute", "feature")
FIELDS: Final = (*KINDS, "read", "over", "unit", *BOUNDS)
REMASK_FIELDS: Final = ("condition", "span", "times")

Over = Literal["mean", "max"]
Read = Literal["projection", "activation"]
ReadUnit = Literal["raw", "max_act"]
RemaskSpan = Literal["block", "response"]
OVER: Final[tuple[Over, ...]] = get_args(Over)
READ: Final[tuple[Read, ...]] = get_args(Read)
READ_UNITS: Final[tuple[ReadUnit, ...]] = get_args(ReadUnit)
REMASK_SPANS: Final[tuple[RemaskSpan, ...]] = get_args(RemaskSpan)
MAX_TIMES: Final = 16
"""How often one rule may have tokens masked again."""


@dataclass(frozen=True)
class Quantity:
    """A number that a forward tells of a row's response, as it is without any push."""

    attribute: str | None = None
    sae: str | None = None
    feature: int | None = None
    over: Over = "mean"
    """Over the positions of the response, masked ones included."""
    read: Read = "projection"
    """For an attribute: <h, v> in residual norms, as a trace has it, or the mean ReLU activation of its steering
    features, as its commitment curve has it."""
    unit: ReadUnit = "raw"
    """For a feature: its activation as it is, or as a share of the largest one that is known."""


@dataclass(frozen=True)
class Compare:
    """What is read, None for progress, and the bounds it must keep, all of them."""

    reading: Quantity | None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def keeps(self, value: float) -> bool:
        """Tell if a value is within the bounds; NaN is within none."""
        return not math.isnan(value) and not (
            (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and value >= self.below)
            or (self.at_most is not None and value > self.at_most)
        )


@dataclass(frozen=True)
class AllOrAny:
    """Conditions of which all must hold, or any."""

    how: Literal["all", "any"]
    parts: tuple["Condition", ...]


@dataclass(frozen=True)
class Not:
    """What holds where the other does not."""

    part: "Condition"


Condition = Compare | AllOrAny | Not


@dataclass(frozen=True)
class Remask:
    """When committed tokens are masked again, to be written anew."""

    condition: Condition
    span: RemaskSpan | tuple[int, int] = "block"
    """The block being written, the whole response, or a half-open span of response positions."""
    times: int = 1
    """How often at most."""


def holds(condition: Condition, values: Mapping[Quantity, float], progress: float) -> bool:
    """Tell if a condition holds. A reading that nothing has told yet counts as 0: nothing is there."""
    if isinstance(condition, AllOrAny):
        found = (holds(part, values, progress) for part in condition.parts)
        return all(found) if condition.how == "all" else any(found)
    if isinstance(condition, Not):
        return not holds(condition.part, values, progress)
    return condition.keeps(progress if condition.reading is None else values.get(condition.reading, 0.0))


def readings(condition: Condition) -> Iterator[Quantity]:
    """Every reading that a condition compares, as often as it does."""
    if isinstance(condition, AllOrAny):
        for part in condition.parts:
            yield from readings(part)
    elif isinstance(condition, Not):
        yield from readings(condition.part)
    elif condition.reading is not None:
        yield condition.reading


def parse_condition(value: Any) -> Condition:
    """The condition that JSON says; raises ValueError with the place in it, the value and what is allowed."""
    found = _parse(value, "", 1)
    count = sum(1 for _ in _comparisons(found))
    if count > MAX_COMPARISONS:
        raise ValueError(f"may hold {MAX_COMPARISONS} comparisons at most, got {count}")
    return found


def parse_remask(value: Any) -> Remask:
    """The rule that `{"condition": ..., "span": ..., "times": ...}` says; raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f'must be {{"condition": ..., "span": ..., "times": ...}}, got {_shown(value)}')
    value = _given(value, REMASK_FIELDS, "")
    _known(value, REMASK_FIELDS, "")
    if "condition" not in value:
        raise ValueError("condition is required")
    times = value.get("times", 1)
    if type(times) is not int or not 1 <= times <= MAX_TIMES:
        raise ValueError(f"times must be a whole number from 1 to {MAX_TIMES}, got {_shown(times)}")
    try:
        condition = parse_condition(value["condition"])
    except ValueError as error:
        raise ValueError(f"condition: {error}") from error
    return Remask(condition, _span(value.get("span", "block")), times)


def _span(value: Any) -> RemaskSpan | tuple[int, int]:
    if isinstance(value, str) and value in REMASK_SPANS:
        return value
    if isinstance(value, Mapping) and set(value) == {"positions"}:
        span = value["positions"]
        if isinstance(span, list | tuple) and len(span) == 2 and all(type(end) is int for end in span):
            first, last = span
            if 0 <= first < last:
                return first, last
    raise ValueError(f'span must be {", ".join(REMASK_SPANS)} or {{"positions": [start, stop]}}, got {_shown(value)}')


def _parse(value: Any, place: str, depth: int) -> Condition:
    if depth > MAX_DEPTH:
        raise ValueError(f"may have {MAX_DEPTH} levels at most")
    if not isinstance(value, Mapping):
        raise ValueError(f"{place or 'it'} must be an object, got {_shown(value)}")
    value = _given(value, FIELDS, place)
    kinds = [kind for kind in KINDS if kind in value]
    if len(kinds) != 1:
        raise ValueError(
            f"{place or 'it'} must have exactly one of {', '.join(KINDS[:-1])} and {KINDS[-1]}, got "
            f"{' and '.join(kinds) or 'none of them'}"
        )
    kind, dot = kinds[0], f"{place}." if place else ""
    if kind in ("all", "any"):
        _known(value, (kind,), place)
        parts = value[kind]
        if not isinstance(parts, list | tuple) or not 1 <= len(parts) <= MAX_COMPARISONS:
            raise ValueError(f"{dot}{kind} must be a list of 1 to {MAX_COMPARISONS} conditions, got {_shown(parts)}")
        joined = tuple(_parse(part, f"{dot}{kind}[{i}]", depth + 1) for i, part in enumerate(parts))
        return AllOrAny("all" if kind == "all" else "any", joined)
    if kind == "not":
        _known(value, ("not",), place)
        return Not(_parse(value["not"], f"{dot}not", depth + 1))
    if kind == "progress":
        _known(value, ("progress",), place)
        inner = value["progress"]
        if not isinstance(inner, Mapping):
            raise ValueError(f"{dot}progress must be an object of {', '.join(BOUNDS)}, got {_shown(inner)}")
        inner = _given(inner, BOUNDS, f"{dot}progress")
        _known(inner, BOUNDS, f"{dot}progress")
        return Compare(None, **_bounds(inner, f"{dot}progress"))
    reading = _attribute(value, place, dot) if kind == "attribute" else _feature(value, place, dot)
    return Compare(reading, **_bounds(value, place))


def _attribute(value: Mapping[str, Any], place: str, dot: str) -> Quantity:
    _known(value, ("attribute", "read", "over", *BOUNDS), place)
    name = value["attribute"]
    if not isinstance(name, str) or not 1 <= len(name) <= 200:
        raise ValueError(f"{dot}attribute must be a name, got {_shown(name)}")
    read = _one_of(value.get("read", "projection"), READ, f"{dot}read")
    return Quantity(attribute=name, read=read, over=_one_of(value.get("over", "mean"), OVER, f"{dot}over"))


def _feature(value: Mapping[str, Any], place: str, dot: str) -> Quantity:
    _known(value, ("feature", "unit", "over", *BOUNDS), place)
    named = value["feature"]
    if (
        not isinstance(named, Mapping)
        or set(named) != {"sae", "index"}
        or not isinstance(named["sae"], str)
        or type(named["index"]) is not int
        or named["index"] < 0
    ):
        raise ValueError(f'{dot}feature must be {{"sae": name, "index": number}}, got {_shown(named)}')
    unit = _one_of(value.get("unit", "raw"), READ_UNITS, f"{dot}unit")
    over = _one_of(value.get("over", "max"), OVER, f"{dot}over")
    return Quantity(sae=named["sae"], feature=named["index"], over=over, unit=unit)


def _bounds(value: Mapping[str, Any], place: str) -> dict[str, float]:
    found = {}
    for name in BOUNDS:
        if name in value:
            bound = value[name]
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not abs(bound) <= MAX_NUMBER:
                raise ValueError(f"{place}{'.' * bool(place)}{name} must be a finite number, got {_shown(bound)}")
            found[name] = float(bound)
    if not found:
        raise ValueError(f"{place or 'it'} must have at least one of {', '.join(BOUNDS)}")
    return found


def _one_of(value: Any, allowed: tuple[str, ...], place: str) -> Any:
    if value not in allowed or not isinstance(value, str):
        raise ValueError(f"{place} must be {' or '.join(allowed)}, got {_shown(value)}")
    return value


def _known(value: Mapping[str, Any], allowed: tuple[str, ...], place: str) -> None:
    unknown = [str(name)[:60] for name in value if name not in allowed]
    if unknown:
        raise ValueError(f"{place or 'it'} has no field {unknown[0]!r}; allowed: {', '.join(allowed)}")


def _given(value: Mapping[str, Any], known: tuple[str, ...], place: str) -> dict[str, Any]:
    """An object's fields without those that are null, which is the same as left out: of those it knows."""
    _known({name: part for name, part in value.items() if part is None}, known, place)
    return {name: part for name, part in value.items() if part is not None}


def _comparisons(condition: Condition) -> Iterator[Compare]:
    if isinstance(condition, AllOrAny):
        for part in condition.parts:
            yield from _comparisons(part)
    elif isinstance(condition, Not):
        yield from _comparisons(condition.part)
    else:
        yield condition


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
