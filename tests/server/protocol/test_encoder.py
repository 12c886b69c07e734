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
    whole = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    assert encoded(value, depth) == whole


def test_keys_that_are_no_strings_become_strings() -> None:
    assert encoded({"layers": {1: [0.5], None: "é"}}) == '{"layers":{"1":[0.5],"null":"é"}}'.encode()


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_what_json_cannot_say_is_refused_at_any_depth(depth: int) -> None:
    for value in (float("nan"), [{"a": (1, float("inf"))}], [[[[[[float("nan")]]]]]]):
        with pytest.raises(ValueError, match="JSON"):
            encoded(value, depth)
