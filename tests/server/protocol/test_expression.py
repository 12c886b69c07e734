"""Steering as text says what the object says, exactly, and an error says where it is."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from steerserve.errors import RequestError
from steerserve.server.protocol import expression
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.parsing import parse
from steerserve.server.protocol.steering import Change, Intervention, SteeringPatch
from steerserve.steering.names import OPERATORS, SCOPE_NAMES, UNITS
from tests.server.text_engine import TextEngine, serving

NAMES = st.one_of(
    st.sampled_from(
        ["topic/sports", "a", "layer-4-mask", "vector", "a b", "x@0123abcd", "-a", "1", "a:b", '"', "größe"]
    ),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-9, 9),
        st.floats(-9, 9),
        st.text(st.characters(codec="utf-8"), max_size=4),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(NAMES, inner, max_size=2)),
    max_leaves=4,
)
SCHEDULES = st.one_of(
    NAMES,
    st.tuples(NAMES, st.dictionaries(NAMES.filter(lambda name: name != "type"), JSON, max_size=3)).map(
        lambda pair: {"type": pair[0], **pair[1]}
    ),
)
SOURCES = st.one_of(
    st.fixed_dictionaries({"attribute": NAMES}),
    st.fixed_dictionaries({"feature": st.fixed_dictionaries({"sae": NAMES, "index": st.integers(0, 2**31 - 1)})}),
    st.fixed_dictionaries({"vector": st.fixed_dictionaries({"name": NAMES})}),
)
SCOPES = st.one_of(
    st.sampled_from(SCOPE_NAMES), st.tuples(st.integers(0, 5), st.integers(6, 9)).map(lambda p: {"positions": list(p)})
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "strength": st.floats(-1e6, 1e6),
        "schedule": SCHEDULES,
        "op": st.sampled_from(OPERATORS),
        "unit": st.sampled_from(UNITS),
        "scope": SCOPES,
        "layers": st.lists(st.integers(0, 40), min_size=1, max_size=3),
        "direction": st.sampled_from(["sae", "diff_means"]),
    },
)


@st.composite
def interventions(draw: st.DrawFn) -> Intervention:
    fields: dict[str, Any] = draw(SOURCES) | draw(OPTIONS)
    if "strength" not in fields and draw(st.booleans()):
        fields["negate"] = True
    return Intervention.model_validate(fields)


@given(st.lists(interventions(), min_size=1, max_size=3))
def test_interventions_come_back_from_their_text_as_they_were(given: list[Intervention]) -> None:
    text = expression.text_of(given)
    assert text is not None
    read = Change.of_text(text)
    assert read.interventions == given
    # And by their bits: -0.0 is not 0.0, 1 is not 1.0.
    assert [repr(one) for one in read.interventions] == [repr(one) for one in given]
    assert expression.text_of(read.interventions) == text


@given(st.text(st.sampled_from('ab:@-+ ().=1"[],') | st.characters(codec="utf-8"), max_size=12))
def test_any_text_is_read_or_refused_with_its_place(text: str) -> None:
    try:
        read = Change.of_text(text).interventions
    except ValueError as error:
        assert str(error).startswith("character ")
    else:
        told = expression.text_of(read)
        assert told is not None and Change.of_text(told).interventions == read


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("topic/sports", [{"attribute": "topic/sports"}]),
        (
            "topic/sports@0.3:commitment - sentiment/negative",
            [
                {"attribute": "topic/sports", "strength": 0.3, "schedule": "commitment"},
                {"attribute": "sentiment/negative", "negate": True},
            ],
        ),
        (
            " -a@1+b@2e-1-c ",
            [
                {"attribute": "a", "strength": -1.0},
                {"attribute": "b", "strength": 0.2},
                {"attribute": "c", "negate": True},
            ],
        ),
        ("s:12:uniform op=clamp", [{"feature": {"sae": "s", "index": 12}, "schedule": "uniform", "op": "clamp"}]),
        ("s:b12", [{"attribute": "s", "schedule": "b12"}]),
        (
            "vector(joy)@.5:window(start=0, stop=0.5)  scope=[0,8]",
            [
                {
                    "vector": {"name": "joy"},
                    "strength": 0.5,
                    "schedule": {"type": "window", "start": 0, "stop": 0.5},
                    "scope": {"positions": [0, 8]},
                }
            ],
        ),
        ('"a@0123abcd"@1:window()', [{"attribute": "a@0123abcd", "strength": 1.0, "schedule": {"type": "window"}}]),
    ],
)
def test_a_text_means_these_interventions(text: str, fields: list[dict[str, Any]]) -> None:
    assert Change.of_text(text).interventions == [Intervention.model_validate(one) for one in fields]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "character 1: expected the name of an attribute"),
        ("topic/sports@", "character 14: expected a number without a sign, found the end"),
        ("topic/sports@-1", "character 14: expected a number without a sign, found '-1'"),
        ("a + ", "character 5: expected the name"),
        ("a b", "character 3: expected '+'"),
        ("a:", "character 3: expected a schedule's name"),
        ("a colour=red", "character 3: colour is no option; there are op"),
        ("a op=add op=add", "character 10: op is given twice"),
        ("a op=shove", "character 6: op: Input should be 'add'"),
        ("a + b@1e9", "character 7: strength: Input should be less than or equal to 1000000"),
        ("a:window(start=x)", "character 16: must be JSON"),
        ("a:window(start=NaN)", "character 16: must be JSON"),
        ("a:window(start=1e999)", "character 16: must be JSON"),
        ("a:window(type=1)", "character 10: 'type' is the schedule's name"),
        ("a:window(start=0", "character 17: expected ','"),
        ("a:window(start=" + "[" * 9999, "character 16: must be JSON"),
        ("a scope=[2,1]", "character 9: scope"),
        ('"\\ud800"', "character 1: must be JSON"),
        (" + ".join("a" * 300), "must have 256 pushes at most; it has 300"),
        ("a" * 20_001, "must have 20000 characters at most; it has 20001"),
    ],
)
def test_a_wrong_text_is_refused_with_its_place(text: str, said: str) -> None:
    for shape, body in ((CompletionRequest, {"model": "text"}), (SteeringPatch, {})):
        with pytest.raises(RequestError) as caught:
            parse(json.dumps(body | {"steering": text}).encode(), shape)
        assert str(caught.value).startswith(f"steering: {said}") and caught.value.param == "steering"


@pytest.mark.parametrize(
    "fields",
    [
        {"vector": {"layer": 1, "values": [1.0]}},
        {"attribute": "a", "when": {"attribute": "a", "above": 0.5}},
    ],
)
def test_what_no_text_says_has_none(fields: dict[str, Any]) -> None:
    assert expression.text_of([Intervention.model_validate(fields)]) is None


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving(TextEngine()) as client:
        yield client


def test_a_text_is_answered_as_its_object_is(client: TestClient) -> None:
    body = {"model": "text", "prompt": "a", "max_tokens": 8, "seed": 1}
    written = {"interventions": [{"attribute": "topic/sports", "strength": 1.0, "schedule": "uniform"}]}
    text = client.post("/v1/completions", json=body | {"steering": "topic/sports@1:uniform"}).json()
    whole = client.post("/v1/completions", json=body | {"steering": written}).json()
    assert text["choices"] == whole["choices"]
    preview = client.post("/v1/steering/preview", json=body | {"steering": written}).json()
    assert preview["text"] == "topic/sports@1:uniform"
    assert client.post("/v1/steering/preview", json=body).json()["text"] is None


def test_what_the_model_lacks_is_refused_at_its_place(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "text", "steering": "topic/sports + nope@1"})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "steering"
    assert answer.json()["error"]["message"].startswith("character 16: ")
