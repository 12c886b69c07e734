import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.server.protocol.encoding import DEPTH, encoded

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


@given(VALUES, st.integers(0, DEPTH))
def test_parts_make_the_json_of_the_whole(value: Any, depth: int) -> None:
    told = encoded(value, depth)
    assert told == encoded(value, 0)
    # To the digit, and in the order of the fields.
    assert json.dumps(json.loads(told)) == json.dumps(value)


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_texts_may_hold_the_names_of_numbers_that_json_cannot_say(depth: int) -> None:
    value = {"text": "NaN, -Infinity é", "Infinity": [1.5]}
    assert encoded(value, depth) == '{"text":"NaN, -Infinity é","Infinity":[1.5]}'.encode()


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        encoded({"text": "\ud800"})


def test_keys_that_are_no_strings_become_strings() -> None:
    assert encoded({"layers": {1: [0.5], 2: "é"}}) == '{"layers":{"1":[0.5],"2":"é"}}'.encode()


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_what_json_cannot_say_is_refused_at_any_depth(depth: int) -> None:
    for value in (float("nan"), [{"a": (1, float("inf"))}], [[[[[[float("nan")]]]]]]):
        with pytest.raises(ValueError, match="JSON"):
            encoded(value, depth)
