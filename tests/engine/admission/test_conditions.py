"""Conditions: what they say, against Python's own logic, and what is no condition."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.api.conditions import (
    Condition,
    Reading,
    Remask,
    holds,
    parse_condition,
    parse_remask,
    readings,
)

SPORTS = Reading(attribute="sports")
SEVENTH = Reading(sae="mask", feature=7, over="max")
PYTHON = {"above": "{} > {}", "at_least": "{} >= {}", "below": "{} < {}", "at_most": "{} <= {}"}

BOUNDS = st.dictionaries(st.sampled_from(list(PYTHON)), st.integers(-2, 2), min_size=1)
LEAVES = (
    BOUNDS.map(lambda bounds: {"attribute": "sports", **bounds})
    | BOUNDS.map(lambda bounds: {"feature": {"sae": "mask", "index": 7}, **bounds})
    | BOUNDS.map(lambda bounds: {"progress": bounds})
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"all": parts})
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"any": parts})
        | inner.map(lambda part: {"not": part})
    ),
    max_leaves=6,
)


def in_python(condition: dict[str, Any]) -> str:
    """The condition as an expression of Python's."""
    [kind, *_] = condition
    if kind in ("all", "any"):
        return "(" + {"all": " and ", "any": " or "}[kind].join(map(in_python, condition[kind])) + ")"
    if kind == "not":
        return f"(not {in_python(condition['not'])})"
    bounds = condition["progress"] if kind == "progress" else condition
    return "(" + " and ".join(PYTHON[name].format(kind, bounds[name]) for name in bounds if name in PYTHON) + ")"


def depth(condition: Any) -> int:
    if isinstance(condition, dict):
        nested: list[Any] = [condition["not"]] if "not" in condition else []
        nested = nested or condition.get("all") or condition.get("any") or []
        return 1 + max(map(depth, nested), default=0)
    return 0


@given(CONDITIONS.filter(lambda one: depth(one) <= 8), st.integers(-2, 2), st.integers(-2, 2), st.integers(-2, 2))
def test_a_condition_holds_where_python_says_so(raw: dict[str, Any], sports: int, seventh: int, progress: int) -> None:
    condition = parse_condition(raw)
    names = {"attribute": sports, "feature": seventh, "progress": progress}
    assert holds(condition, {SPORTS: sports, SEVENTH: seventh}, progress) == eval(in_python(raw), {}, names)
    assert set(readings(condition)) <= {SPORTS, SEVENTH}


@pytest.mark.parametrize(
    ("a", "b", "of_all", "of_any"),
    [(1, 1, True, True), (1, 0, False, True), (0, 1, False, True), (0, 0, False, False)],
)
def test_the_truth_tables(a: int, b: int, of_all: bool, of_any: bool) -> None:
    parts = [{"attribute": "sports", "above": 0.5}, {"feature": {"sae": "mask", "index": 7}, "above": 0.5}]
    values = {SPORTS: float(a), SEVENTH: float(b)}
    assert holds(parse_condition({"all": parts}), values, 0.0) is of_all
    assert holds(parse_condition({"any": parts}), values, 0.0) is of_any
    assert holds(parse_condition({"not": parts[0]}), values, 0.0) is not bool(a)


def test_what_has_not_been_read_is_nothing() -> None:
    assert not holds(parse_condition({"attribute": "sports", "above": 0.0}), {}, 0.0)
    assert holds(parse_condition({"attribute": "sports", "below": 0.1}), {}, 0.0)
    assert not holds(parse_condition({"attribute": "sports", "below": 0.1}), {SPORTS: math.nan}, 0.0)


def test_the_options_of_a_reading() -> None:
    def reading(raw: dict[str, Any]) -> Reading:
        [one] = readings(parse_condition(raw | {"above": 1, "below": None}))
        return one

    activation = reading({"attribute": "a", "read": "activation", "over": "max"})
    assert activation == Reading("a", over="max", read="activation")
    share = reading({"feature": {"sae": "s", "index": 0}, "unit": "max_act", "over": "mean"})
    assert share == Reading(sae="s", feature=0, over="mean", unit="max_act")


LEAF: dict[str, Any] = {"attribute": "a", "above": 1}


def nested(levels: int) -> dict[str, Any]:
    condition: Any = LEAF
    for _ in range(levels):
        condition = {"not": condition}
    made: dict[str, Any] = condition
    return made


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "it must be an object, got \\[\\]"),
        ({}, "exactly one of all, any, not, progress, attribute and feature, got none of them"),
        ({"all": [LEAF], "any": [LEAF]}, "got all and any"),
        ({"all": []}, "all must be a list of 1 to 32"),
        ({"all": LEAF}, "all must be a list"),
        ({"all": [LEAF, {"any": [LEAF, 3]}]}, "all\\[1\\].any\\[1\\] must be an object, got 3"),
        ({"attribute": "a"}, "at least one of above, at_least, below, at_most"),
        ({"attribute": "a", "over": "sum", "above": 1}, "over must be mean or max, got 'sum'"),
        ({"attribute": "a", "read": "mean", "above": 1}, "read must be projection or activation"),
        ({"attribute": "", "above": 1}, "attribute must be a name"),
        ({"attribute": "a", "above": "1"}, "above must be a finite number, got '1'"),
        ({"attribute": "a", "above": True}, "above must be a finite number"),
        ({"attribute": "a", "above": math.nan}, "above must be a finite number"),
        ({"attribute": "a", "above": 1, "unit": "raw"}, "no field 'unit'; allowed: attribute, read, over"),
        ({"feature": {"sae": "s"}, "above": 1}, "feature must be"),
        ({"feature": {"sae": "s", "index": -1}, "above": 1}, "feature must be"),
        ({"feature": {"sae": "s", "index": True}, "above": 1}, "feature must be"),
        ({"progress": 0.5}, "progress must be an object of above"),
        ({"progress": {"over": 1}}, "progress has no field 'over'"),
        ({"progress": {"above": 0.1}, "above": 1}, "has no field 'above'"),
        (nested(8), "8 levels at most"),
        ({"any": [{"all": [LEAF] * 20}, {"all": [LEAF] * 20}]}, "32 comparisons at most, got 40"),
    ],
)
def test_what_is_no_condition_is_refused(raw: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_condition(raw)


def test_a_deep_condition_may_just_be_so_deep() -> None:
    condition: Condition = parse_condition(nested(7))
    assert list(readings(condition)) == [Reading(attribute="a")]


def test_what_is_masked_again() -> None:
    leaf = parse_condition(LEAF)
    assert parse_remask({"condition": LEAF}) == Remask(leaf, "block", 1)
    assert parse_remask({"condition": LEAF, "span": "response", "times": 3}) == Remask(leaf, "response", 3)
    assert parse_remask({"condition": LEAF, "span": {"positions": [2, 5]}}) == Remask(leaf, (2, 5), 1)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (LEAF, "has no field 'attribute'; allowed: condition, span, times"),
        ({"span": "block"}, "condition is required"),
        ({"condition": {"all": []}}, "condition: all must be a list"),
        ({"condition": LEAF, "span": "row"}, "span must be block, response or"),
        ({"condition": LEAF, "span": {"positions": [3, 3]}}, "span must be"),
        ({"condition": LEAF, "span": {"positions": [0, 3, 4]}}, "span must be"),
        ({"condition": LEAF, "times": 0}, "times must be a whole number from 1 to 16, got 0"),
        ({"condition": LEAF, "times": True}, "times must be"),
        (3, "must be .*, got 3"),
    ],
)
def test_what_cannot_be_masked_again_is_refused(raw: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_remask(raw)


def test_null_is_the_same_as_left_out() -> None:
    plain = {"progress": {"above": 0.5}}
    assert parse_condition({"progress": {"above": 0.5, "below": None}}) == parse_condition(plain)
    found = parse_remask({"condition": plain, "span": None, "times": None})
    assert found == parse_remask({"condition": plain})
