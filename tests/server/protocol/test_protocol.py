import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.errors import RequestError
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.parsing import parse, shown

DESIGN_EXAMPLE: dict[str, Any] = {
    "model": "bundled",
    "prompt": "The",
    "max_tokens": 64,
    "temperature": 1.0,
    "top_p": 1.0,
    "n": 1,
    "seed": 7,
    "stop": ["\n"],
    "logprobs": 0,
    "stream": False,
    "diffusion": {"steps": 64, "block_length": None, "order": "confidence", "transfer": "linear", "cfg_scale": 0.0},
    "steering": {
        "interventions": [
            {"attribute": "topic/sports", "strength": 0.3, "schedule": "commitment"},
            {
                "feature": {"sae": "layer-4-mask", "index": 812},
                "op": "clamp",
                "strength": 1.0,
                "unit": "max_act",
                "scope": "masked",
                "schedule": {"type": "window", "start": 0.0, "stop": 0.5},
            },
            {"vector": {"layer": 4, "values": [0.1, -0.2]}, "op": "project_out", "strength": 1.0},
        ],
        "combine": "independent",
        "baseline": True,
        "trace": {"attributes": ["topic/sports"], "every": 4},
        "control": None,
    },
}


def complaint(body: Any) -> RequestError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        parse(raw, CompletionRequest)
    return caught.value


def intervention(**fields: Any) -> dict[str, Any]:
    return {"model": "text", "steering": {"interventions": [{"attribute": "a"}, {"attribute": "b"} | fields]}}


def test_design_example_is_valid() -> None:
    body = parse(json.dumps(DESIGN_EXAMPLE).encode(), CompletionRequest)
    assert body.steering.interventions[1].schedule == {"type": "window", "start": 0.0, "stop": 0.5}


def test_null_means_left_out() -> None:
    names = [name for name in CompletionRequest.model_fields if name != "model"]
    nulls = parse(json.dumps({"model": "text"} | dict.fromkeys(names)).encode(), CompletionRequest)
    assert nulls == parse(b'{"model": "text"}', CompletionRequest)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "model", "required"),
        ({"model": 5}, "model", "got 5"),
        ({"model": "text", "steerin": {}}, "steerin", "known: model, max_tokens"),
        ({"model": "text", "tools": []}, "tools", "not a known field"),
        ({"model": "text", "prompt": ""}, "prompt", "at least 1 character"),
        ({"model": "text", "prompt": []}, "prompt", "at least 1 item"),
        ({"model": "text", "prompt": ["a", ""]}, "prompt[1]", "at least 1 character"),
        ({"model": "text", "prompt": [1, -2]}, "prompt[1]", "got -2"),
        ({"model": "text", "prompt": [[1], [True]]}, "prompt[1][0]", "got true"),
        ({"model": "text", "prompt": {"a": 1}}, "prompt", "list of token ids"),
        ({"model": "text", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"model": "text", "max_tokens": "8"}, "max_tokens", 'got "8"'),
        ({"model": "text", "max_tokens": 8.5}, "max_tokens", "got 8.5"),
        ({"model": "text", "n": True}, "n", "got true"),
        ({"model": "text", "temperature": -1}, "temperature", "temperature must be 0 to 2, got -1"),
        ({"model": "text", "temperature": 2.01}, "temperature", "temperature must be 0 to 2, got 2.01"),
        ({"model": "text", "top_p": 0}, "top_p", "greater than 0"),
        ({"model": "text", "seed": -1}, "seed", "got -1"),
        ({"model": "text", "stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"model": "text", "stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"model": "text", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"model": "text", "logprobs": False}, "logprobs", "got false"),
        ({"model": "text", "best_of": 0}, "best_of", "got 0"),
        ({"model": "text", "n": 2, "best_of": 1}, "best_of", "must be at least n, which is 2, got 1"),
        ({"model": "text", "best_of": 3, "stream": True}, "best_of", "must be n, which is 1, in a stream, got 3"),
        ({"model": "text", "steering": {"rank": "a"}}, "steering.rank", 'got "a"'),
        ({"model": "text", "steering": {"rank": ["a", ""]}}, "steering.rank[1]", "at least 1 character"),
        ({"model": "text", "max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", "which is 4"),
        ({"model": "text", "ignore_eos": True, "diffusion": {"ignore_eos": False}}, "ignore_eos", "diffusion"),
        ({"model": "text", "repetition_penalty": 1.1}, "repetition_penalty", "send 1.0"),
        ({"model": "text", "min_p": 0.1}, "min_p", "send 0.0"),
        ({"model": "text", "min_tokens": 4}, "min_tokens", "send 0"),
        ({"model": "text", "skip_special_tokens": False}, "skip_special_tokens", "send true"),
        ({"model": "text", "use_beam_search": True}, "use_beam_search", "send false"),
        (
            {"model": "text", "echo": True, "stream": True, "diffusion": {"stream_mode": "events"}},
            "echo",
            "the response only",
        ),
        ({"model": "text", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"model": "text", "stream_options": {}}, "stream_options", '"stream": true'),
        ({"model": "text", "diffusion": {"stream_mode": "events"}}, "diffusion.stream_mode", '"stream": true'),
        ({"model": "text", "diffusion": {"steps": -4}}, "diffusion.steps", "got -4"),
        ({"model": "text", "diffusion": {"order": {"name": "x"}}}, "diffusion.order", '"type"'),
        ({"model": "text", "diffusion": {"cfg_scale": -1.5}}, "diffusion.cfg_scale", "greater than or equal to 0"),
        ({"model": "text", "steering": {"limits": {}}}, "steering.limits", "at least one of max_kl"),
        ({"model": "text", "steering": {"limits": {"max_kl": 0}}}, "steering.limits.max_kl", "greater than 0"),
        ({"model": "text", "steering": {"limits": {"max_kl": "1"}}}, "steering.limits.max_kl", 'got "1"'),
        ({"model": "text", "steering": {"limits": {"max_delta": -1.0}}}, "steering.limits.max_delta", "greater than 0"),
        ({"model": "text", "steering": {"limits": {"max_l2": 1}}}, "steering.limits.max_l2", "known: max_kl"),
        (
            {"model": "text", "steering": {"limits": {"max_kl": 1, "on_exceed": "stop"}}},
            "steering.limits.on_exceed",
            "'clip'",
        ),
        ({"model": "text", "steering": {"control": "shuffle"}}, "steering.control", "'random'"),
        ({"model": "text", "steering": {"combine": "both"}}, "steering.combine", "'independent'"),
        ({"model": "text", "steering": {"measure_kl": 1}}, "steering.measure_kl", "got 1"),
        ({"model": "text", "steering": {"trace": {"attributes": []}}}, "steering.trace.attributes", "at least 1"),
        (intervention(strenght=1), "steering.interventions[1].strenght", "known: attribute"),
        (intervention(strength="1"), "steering.interventions[1].strength", 'got "1"'),
        (intervention(strength=1e7), "steering.interventions[1].strength", "1000000"),
        (intervention(feature={"sae": "s", "index": 1}), "steering.interventions[1]", "attribute and feature"),
        (intervention(attribute=None), "steering.interventions[1]", "names none"),
        (intervention(scope={"positions": [5, 5]}), "steering.interventions[1].scope", "start < stop"),
        (intervention(scope=["all"]), "steering.interventions[1].scope", "positions"),
        (intervention(op="push"), "steering.interventions[1].op", "'project_out'"),
        (intervention(layers=[]), "steering.interventions[1].layers", "at least 1"),
        (intervention(schedule={"type": "window", "start": "x" * 300}), "steering.interventions[1].schedule", "start"),
    ],
)
def test_error_names_field_value_and_what_is_allowed(body: Any, param: str, said: str) -> None:
    error = complaint(body)
    assert error.param == param
    assert said in str(error)


def test_what_load_generators_send_asks_for_nothing() -> None:
    neutral = {
        "repetition_penalty": 1.0,
        "min_p": 0,
        "min_tokens": 0,
        "skip_special_tokens": True,
        "use_beam_search": False,
        "top_k": -1,
        "best_of": 1,
        "frequency_penalty": 0,
        "logit_bias": {},
    }
    body = parse(json.dumps({"model": "text", "ignore_eos": True} | neutral).encode(), CompletionRequest)
    assert body.ignore_eos


def test_the_length_goes_by_either_name() -> None:
    lengths = [{}, {"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}]
    bodies = [parse(json.dumps({"model": "text"} | one).encode(), CompletionRequest) for one in lengths]
    assert [body.length for body in bodies] == [64, 5, 5, 5]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize(
    "field",
    [
        '"temperature": {}',
        '"diffusion": {{"transfer": {{"type": "threshold", "value": {}}}}}',
        '"steering": {{"interventions": [{{"attribute": "a", "strength": {}}}]}}',
        '"steering": {{"interventions": [{{"vector": {{"layer": 1, "values": [1, {}]}}}}]}}',
        '"frequency_penalty": {}',
    ],
)
def test_numbers_are_finite_everywhere(field: str, number: str) -> None:
    complaint(('{"model": "text", ' + field.format(number) + "}").encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'"\\ud800"', b"[" * 10_000, b"1" * 9_000, b"null", b"[]", b"7"])
def test_what_is_not_a_json_object_is_refused(raw: bytes) -> None:
    assert complaint(raw).param is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_shown_values_are_short(value: Any) -> None:
    assert len(shown(value)) <= 103
