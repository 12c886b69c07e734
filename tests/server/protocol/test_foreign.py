"""The steering of other servers, as their clients serialise it (github pages and packages named beside each)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.conditions import parse_condition
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, VectorRef
from steerserve.errors import NotFoundError, RequestError
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.parsing import parse
from steerserve.server.rows.interventions import check_model, pushes
from steerserve.server.rows.rows import admit, rows_of
from tests import tiny

# What goodfire 0.3.5 sends for `c[pirates] += 0.6; c[whales, ships] = 0.4; c[rum] *= 2`.
EMBER: dict[str, Any] = {
    "interventions": [
        {
            "mode": "nudge",
            "features": {
                "features": [
                    {
                        "uuid": "00000000-0000-0000-0000-000000000001",
                        "label": "Pirate speech",
                        "index_in_sae": 7,
                        "max_activation_strength": 1,
                    }
                ]
            },
            "value": 0.6,
        },
        {
            "mode": "pin",
            "features": {
                "features": [
                    {"uuid": "2", "label": "Whale facts", "index_in_sae": 11, "max_activation_strength": 1.5},
                    {"uuid": "3", "label": "Ships", "index_in_sae": 12, "max_activation_strength": 2.0},
                ]
            },
            "value": 0.4,
        },
        {"mode": "mul", "features": {"features": [{"uuid": "4", "label": "Rum", "index_in_sae": 13}]}, "value": 2},
    ],
    "scopes": [],
    "name": "controller__14044128",
    "nonzero_strength_threshold": None,
    "min_nudge_entropy": None,
    "max_nudge_entropy": None,
}
SCOPE = {
    "conditionals": {
        "conditionals": [
            {"left_hand": {"features": [{"uuid": "2", "index_in_sae": 41}]}, "right_hand": 0.25, "operator": ">"}
        ],
        "operator": "AND",
    },
    "controller": {"interventions": [], "scopes": []},
    "is_active": False,
    "event_name": None,
}
GROUP = {"features": [{"index_in_sae": 1}, {"index_in_sae": 2}]}


def compared(**changes: Any) -> dict[str, Any]:
    """SCOPE with another comparison."""
    inner: Any = SCOPE["conditionals"]
    return SCOPE | {"conditionals": inner | {"conditionals": [inner["conditionals"][0] | changes]}}


# Neuronpedia's inference server and its public API.
INFERENCE: dict[str, Any] = {
    "steerMethod": "SIMPLE_ADDITIVE",
    "normalizeSteering": False,
    "features": [{"model": "text", "source": "layer-1-mask", "index": 9, "strength": 5.0}],
    "strengthMultiplier": 4.0,
}
PUBLIC: dict[str, Any] = {
    "features": [
        {"modelId": "text", "layer": "layer-1-mask", "index": 9, "strength": 5},
        {"modelId": "text", "layer": "layer-2-mask", "index": 3, "strength": -0.1},
    ],
    "strength_multiplier": 4,
    "steer_method": "ORTHOGONAL_DECOMP",
}
# EasySteer's API v2.
EASYSTEER: dict[str, Any] = {
    "vectors": [
        {
            "source": "vectors/warm.gguf",
            "algorithm": "direct",
            "scale": 2.0,
            "layers": [0, 2],
            "normalize": False,
            "apply": {"prompt": "all", "generation_window": [0, 8]},
            "params": {},
            "name": "happy",
        }
    ],
    "conflict": "priority",
    "debug": False,
}


def body_of(**steering: Any) -> CompletionRequest:
    return parse(json.dumps({"model": "text", "steering": steering}).encode(), CompletionRequest)


def interventions(**steering: Any) -> list[Intervention]:
    return [one for one, _ in pushes(body_of(**steering).steering)]


def complaint(**steering: Any) -> tuple[str | None, str]:
    with pytest.raises(RequestError) as caught:
        check_model(body_of(**steering).steering, "text")
    return caught.value.param, str(caught.value)


def test_ember_nudges_pins_and_multiplies() -> None:
    told = interventions(ember={"sae": "s", "controller": EMBER})
    assert [(one.feature, one.op, one.strength, one.unit) for one in told] == [
        (FeatureRef("s", 7), "add", 0.6, "max_act"),
        (FeatureRef("s", 11), "clamp", 0.4, "max_act"),
        (FeatureRef("s", 12), "clamp", 0.4, "max_act"),
        (FeatureRef("s", 13), "multiply", 2.0, None),
    ]
    assert {(one.scope, one.schedule, one.when) for one in told} == {("all", "uniform", None)}


def feature_of(index: int, **bounds: float) -> dict[str, Any]:
    return {"feature": {"sae": "s", "index": index}, "unit": "max_act", "over": "max", **bounds}


@pytest.mark.parametrize(
    ("scope", "when"),
    [
        (SCOPE, feature_of(41, above=0.25)),
        (compared(operator="<"), feature_of(41, below=0.25)),
        (compared(operator=">="), feature_of(41, at_least=0.25)),
        (compared(operator="<="), feature_of(41, at_most=0.25)),
        (compared(operator="=="), feature_of(41, at_least=0.25, at_most=0.25)),
        (compared(operator="!="), {"not": feature_of(41, at_least=0.25, at_most=0.25)}),
    ],
)
def test_a_scope_of_ember_pushes_while_its_conditions_hold(scope: dict[str, Any], when: dict[str, Any]) -> None:
    scope = scope | {"controller": {"interventions": [EMBER["interventions"][0]], "scopes": []}}
    told = interventions(ember={"sae": "s", "controller": EMBER | {"scopes": [scope]}})
    assert [one.when for one in told] == [None] * 4 + [when]
    assert told[4].feature == FeatureRef("s", 7)
    parse_condition(when)


def test_comparisons_of_ember_are_joined_as_it_says() -> None:
    inner: Any = compared()["conditionals"]
    both = {"conditionals": inner["conditionals"] * 2, "operator": "OR"}
    scope = SCOPE | {"conditionals": both, "controller": {"interventions": EMBER["interventions"]}}
    told = interventions(ember={"sae": "s", "controller": {"scopes": [scope]}})
    assert {json.dumps(one.when) for one in told} == {json.dumps({"any": [feature_of(41, above=0.25)] * 2})}
    assert len(told) == 4


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"scopes": [SCOPE | {"event_name": "abort"}]}, "scopes[0].event_name"),
        ({"scopes": [SCOPE | {"controller": {"scopes": [SCOPE]}}]}, "scopes[0].controller.scopes"),
        ({"scopes": [compared(left_hand=GROUP)]}, "scopes[0].conditionals.conditionals[0].left_hand.features"),
        ({"scopes": [compared(operator="~")]}, "scopes[0].conditionals.conditionals[0].operator"),
        ({"nonzero_strength_threshold": 0.1}, "nonzero_strength_threshold"),
        ({"min_nudge_entropy": 0.5}, "min_nudge_entropy"),
        ({"max_nudge_entropy": 0.5}, "max_nudge_entropy"),
        ({"abort_when": []}, "abort_when"),
        ({"interventions": [EMBER["interventions"][0] | {"mode": "steer"}]}, "interventions[0].mode"),
        ({"interventions": [EMBER["interventions"][0] | {"value": "0.6"}]}, "interventions[0].value"),
        (
            {"interventions": [EMBER["interventions"][0] | {"features": {"features": [{"uuid": "1"}]}}]},
            "interventions[0].features.features[0].index_in_sae",
        ),
    ],
)
def test_what_ember_says_and_we_cannot_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    assert complaint(ember={"sae": "s", "controller": EMBER | change})[0] == f"steering.ember.controller.{param}"


def test_neuronpedia_adds_the_decoder_row_as_it_is_stored() -> None:
    assert interventions(neuronpedia=INFERENCE) == [
        Intervention(
            feature=FeatureRef("layer-1-mask", 9), strength=20.0, unit="stored", scope="all", schedule="uniform"
        )
    ]


def test_neuronpedia_rescales_and_caps_a_projection() -> None:
    first, second = interventions(neuronpedia=PUBLIC)
    # h - (1 - c) P h with c of 20 and of -0.4.
    assert (first.op, first.strength, first.unit) == ("project_out", -19.0, None)
    assert second.op == "project_out"
    assert second.strength == pytest.approx(1.4)
    [cap] = interventions(neuronpedia=INFERENCE | {"steerMethod": "PROJECTION_CAP"})
    assert (cap.op, cap.strength, cap.unit) == ("cap", 20.0, "raw")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (INFERENCE | {"normalizeSteering": True}, "normalizeSteering", "send false"),
        (INFERENCE | {"steerMethod": "OTHER"}, "steerMethod", "SIMPLE_ADDITIVE"),
        (INFERENCE | {"strength_multiplier": 4.0}, "strengthMultiplier", "another spelling"),
        (INFERENCE | {"strengthMultiplier": None}, "strength_multiplier", "required"),
        (INFERENCE | {"features": []}, "features", "at least 1"),
        (INFERENCE | {"vectors": []}, "vectors", "known: features"),
        (INFERENCE | {"features": [{"index": 1, "strength": 1}]}, "features[0].source", "required"),
        (
            INFERENCE | {"features": [{"model": "gemma-2-2b", "source": "s", "index": 1, "strength": 1}]},
            "features[0].model",
            "the model served is 'text'",
        ),
        (
            PUBLIC | {"features": [{"modelId": "gemma", "layer": "s", "index": 1, "strength": 1}]},
            "features[0].modelId",
            "'gemma'",
        ),
    ],
)
def test_what_neuronpedia_says_and_we_cannot_is_refused_by_name(body: dict[str, Any], param: str, said: str) -> None:
    told = complaint(neuronpedia=body)
    assert told[0] == f"steering.neuronpedia.{param}"
    assert said in told[1]


def test_easysteer_pushes_each_region_of_the_union_once() -> None:
    one = Intervention(
        vector=VectorRef(name="warm"), strength=2.0, unit="stored", layers=(0, 2), scope="prompt", schedule="uniform"
    )
    assert interventions(easysteer=EASYSTEER) == [one, replace(one, scope=(0, 8))]


@pytest.mark.parametrize(
    ("apply", "scopes"),
    [
        ({"prompt": "all"}, ["prompt"]),
        ({"generation": "all"}, ["response"]),
        ({"prompt": "all", "generation": "all"}, ["all"]),
        ({"prompt": "all", "generation": "all", "generation_window": [0, 3]}, ["all"]),
        ({"generation": "all", "generation_window": [0, 3]}, ["response"]),
        ({"generation_window": [2, 3]}, [(2, 3)]),
    ],
)
def test_easysteers_where_clause(apply: dict[str, Any], scopes: list[Any]) -> None:
    vector = {"source": "warm.gguf", "apply": apply}
    assert [one.scope for one in interventions(easysteer={"vectors": [vector]})] == scopes


@pytest.mark.parametrize(
    ("source", "name"), [("a/b/warm.gguf", "warm"), ("warm", "warm"), ("/x/warm.v2.gguf", "warm.v2"), ("~/.w", ".w")]
)
def test_easysteers_source_is_a_name(source: str, name: str) -> None:
    [one] = interventions(easysteer={"vectors": [{"source": source, "apply": {"prompt": "all"}}]})
    assert one.vector == VectorRef(name=name)
    assert one.strength == 1.0


def vector(**change: Any) -> dict[str, Any]:
    return {"vectors": [EASYSTEER["vectors"][0] | change]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (vector(algorithm="loreft"), "vectors[0].algorithm"),
        (vector(params={"mode": "x"}), "vectors[0].params"),
        (vector(source="vectors/"), "vectors[0].source"),
        (vector(data={"0": [1.0]}), "vectors[0].data"),
        (vector(apply=None), "vectors[0].apply"),
        (vector(apply={}), "vectors[0].apply"),
        (vector(apply={"prompt": "all", "exclude_prompt_tokens": [1]}), "vectors[0].apply.exclude_prompt_tokens"),
        (vector(apply={"prompt_positions": [-1]}), "vectors[0].apply.prompt_positions"),
        (vector(apply={"generation_window": [3, 3]}), "vectors[0].apply.generation_window"),
        (vector(apply={"generation_window": [3, None]}), "vectors[0].apply.generation_window[1]"),
        (EASYSTEER | {"vectors": EASYSTEER["vectors"] * 2}, "conflict"),
        (EASYSTEER | {"debug": True}, "debug"),
    ],
)
def test_what_easysteer_says_and_we_cannot_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert complaint(easysteer=body)[0] == f"steering.easysteer.{param}"


def test_several_vectors_add_up() -> None:
    both = EASYSTEER | {"vectors": EASYSTEER["vectors"] * 2, "conflict": "sequential"}
    assert len(interventions(easysteer=both)) == 4


def test_one_language_a_request() -> None:
    ours = [{"attribute": "a"}]
    assert complaint(interventions=ours, easysteer=EASYSTEER)[0] == "steering.easysteer"
    assert complaint(ember={"sae": "s", "controller": EMBER}, neuronpedia=INFERENCE)[0] == "steering.neuronpedia"


def test_a_real_engine_runs_them(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    cap = INFERENCE | {"steerMethod": "PROJECTION_CAP", "strengthMultiplier": -1.0}
    for steering in (
        {"ember": {"sae": "layer-1-mask", "controller": EMBER}},
        {"neuronpedia": cap},
        {"easysteer": EASYSTEER},
    ):
        rows = rows_of(body_of(**steering), seed=1, max_rows=1)
        [(_, result)] = tiny.run(served, rows[0].params)
        assert result.receipt is not None
        told = result.receipt["interventions"]
        assert len(told) == len(rows[0].params.interventions)
        assert any(one["applied"] for one in told)
    # The vector's direction as it is stored: twice the norms 3 and 4.
    sites = told[0]["sites"]
    assert [site["strength_hidden"] for site in sites] == [6.0, 8.0]


@pytest.mark.parametrize(
    ("steering", "param"),
    [
        ({"ember": {"sae": "nope", "controller": EMBER}}, "ember.controller.interventions[0].features.features[0]"),
        (
            {"neuronpedia": INFERENCE | {"features": [{"source": "no", "index": 1, "strength": 1}]}},
            "neuronpedia.features[0]",
        ),
        ({"easysteer": vector(source="cold.gguf")}, "easysteer.vectors[0]"),
    ],
)
def test_names_that_are_not_here_are_told_where_they_stand(tmp_path: Path, steering: Any, param: str) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    body = body_of(**steering)
    with pytest.raises(NotFoundError) as caught:
        admit(served.admit, rows_of(body, 1, 1), body)
    assert caught.value.param == f"steering.{param}"


def test_they_steer_as_our_own_words_do(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    ours = Intervention(vector=VectorRef(name="warm"), strength=2.0, unit="stored", scope="response")
    [one] = interventions(easysteer=vector(apply={"generation": "all"}, layers=None))
    params = GenerationParams(prompt="the king", max_tokens=12, seed=3)
    responses = [tiny.tokens_of(served, replace(params, interventions=(push,))) for push in (ours, one)]
    assert responses[0] == responses[1] != tiny.tokens_of(served, params)
