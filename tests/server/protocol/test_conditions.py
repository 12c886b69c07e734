"""Feedback and conditions over HTTP, on a real engine: previewed, refused by field, streamed to the same text."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.engine.api.conditions import parse_remask
from steerserve.server.app import create_app
from steerserve.server.protocol.conditions import CONDITION, REMASK
from tests import tiny
from tests.server.torch_service import service_of

DONE = {"progress": {"at_least": 1.0}}
HALF = {"progress": {"at_least": 0.5}}
PUSH = {"attribute": "topic/sports", "strength": 2.0, "schedule": "uniform"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engine = tiny.engine(tiny.bert(), tmp_path_factory.mktemp("served"))
    for one in engine.catalogue.saes.values():
        one.facts = replace(one.facts, sha256="ff" * 32 if one.facts.id == "layer-1-mask" else "00" * 32)
    with TestClient(create_app(service_of(engine, "tiny"), ServerConfig())) as opened:
        yield opened


def body(steering: dict[str, Any], **more: Any) -> dict[str, Any]:
    diffusion = {"steps": 8, "ignore_eos": True, "order": "random", "transfer": "linear"} | more.pop("diffusion", {})
    shape = {"model": "tiny", "prompt": "the king", "max_tokens": 16, "seed": 5, "temperature": 1.0}
    return shape | {"diffusion": diffusion, "steering": steering} | more


def answer(client: TestClient, steering: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body(steering, **more))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refusal(client: TestClient, steering: dict[str, Any]) -> tuple[str, str]:
    response = client.post("/v1/completions", json=body(steering))
    assert response.status_code in (400, 404), response.text
    return response.json()["error"]["param"], response.json()["error"]["message"]


def streamed(client: TestClient, steering: dict[str, Any], mode: str, **more: Any) -> list[dict[str, Any]]:
    asked = body(steering, **more)
    asked |= {"stream": True, "diffusion": asked["diffusion"] | {"stream_mode": mode}}
    lines = client.post("/v1/completions", json=asked).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


REWRITES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"condition": DONE, "span": "response"}, {}),
    ({"condition": HALF, "span": {"positions": [2, 9]}, "times": 2}, {"block_length": 4}),
    ({"condition": HALF, "span": "block", "times": 3}, {"block_length": 4}),
    ({"condition": HALF, "span": "block"}, {"block_length": 8, "transfer": {"type": "remdm", "eta": 0.3}, "steps": 16}),
]


@pytest.mark.parametrize(("remask", "diffusion"), REWRITES)
@pytest.mark.parametrize("more", [{}, {"stop": ["e"]}, {"seed": 8}])
def test_every_stream_of_a_rewritten_text_comes_to_the_answer(
    client: TestClient, remask: dict[str, Any], diffusion: dict[str, Any], more: dict[str, Any]
) -> None:
    steering = {"remask_when": remask, "interventions": [PUSH]}
    found = answer(client, steering, diffusion=diffusion, **more)
    whole = found["choices"][0]["text"]
    append = streamed(client, steering, "append", diffusion=diffusion, **more)
    assert "".join(chunk["choices"][0]["text"] for chunk in append) == whole
    changed = streamed(client, steering, "replace", diffusion=diffusion, **more)
    assert changed[-1]["choices"][0]["text"] == whole
    events = streamed(client, steering, "events", diffusion=diffusion, **more)
    assert events[-1]["text"] == whole
    tokens: dict[int, int] = {}
    for one in events:
        if one["type"] == "committed":
            assert not tokens.keys() & set(one["positions"])
            tokens |= dict(zip(one["positions"], one["tokens"], strict=True))
        if one["type"] == "revised":
            for position in one["positions"]:
                del tokens[position]
    if not more.get("stop"):
        assert found["choices"][0]["steering"]["remasked"]
        assert sorted(tokens) == list(range(16))
        assert [one["text"] for one in events if one["type"] in ("committed", "revised")][-1] == whole


def test_blocks_that_are_final_are_told_before_the_text_ends(client: TestClient) -> None:
    steering = {"remask_when": {"condition": HALF, "span": "block"}}
    chunks = streamed(client, steering, "append", diffusion={"block_length": 4})
    assert len([chunk for chunk in chunks if chunk["choices"][0]["text"]]) > 1


@pytest.mark.parametrize("mode", ["append", "replace", "events"])
def test_an_aborted_text_is_told_as_filtered(client: TestClient, mode: str) -> None:
    steering = {"abort_when": HALF, "interventions": [PUSH], "baseline": True}
    found = answer(client, steering, diffusion={"block_length": 4})
    [choice] = found["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["baseline"]["finish_reason"] == "length"
    aborted = {"step": 3, "progress": 0.5, "answer": "committed", "behind_gap": []}
    assert found["choices"][0]["steering"]["aborted"] == aborted
    assert choice["text"]
    frames = streamed(client, steering, mode, diffusion={"block_length": 4})
    if mode == "events":
        assert [one["finish_reason"] for one in frames if one["type"] == "done" and not one["baseline"]] == [
            "content_filter"
        ]
        return
    told = [frame["choices"][0] for frame in frames]
    assert told[-1]["finish_reason"] == "content_filter"
    text = "".join(one["text"] for one in told) if mode == "append" else told[-1]["text"]
    assert text == choice["text"]


def test_a_preview_says_what_the_run_decides(client: TestClient) -> None:
    push = {"attribute": "topic/sports", "strength": 1.0, "schedule": {"type": "feedback", "peak": 2}, "when": HALF}
    steering = {"interventions": [push], "remask_when": {"condition": DONE, "times": 2}}
    [plan] = client.post("/v1/steering/preview", json=body(steering)).json()["plans"]
    assert (plan["steps"], plan["max_steps"], plan["revises"], plan["revised_within"]) == (8, 24, True, 16)
    [one] = plan["interventions"]
    assert one["strength_per_step"] is None
    assert one["schedule"]["peak"] == 2
    assert one["when"] == HALF
    assert any("0 to 2" in note for note in one["notes"])


def test_feedback_is_told_in_the_answer(client: TestClient) -> None:
    push = {"attribute": "topic/sports", "strength": 1.0, "schedule": "feedback"}
    found = answer(client, {"interventions": [push], "receipt": "full"})
    [told] = found["choices"][0]["steering"]["interventions"]
    assert len(told["feedback"]["readings"]) == len(told["strength_per_step"]) == found["usage"]["forward_passes"]


ALL = {"all": [{"attribute": "a", "above": 0.1, "below": 2}, {"not": {"any": [HALF, DONE]}}]}
FEATURE = {"feature": {"sae": "layer-1-mask", "index": 4}, "over": "mean", "unit": "raw", "at_most": -1}


@pytest.mark.parametrize("condition", [HALF, ALL, FEATURE, {"attribute": "a", "read": "activation", "above": 1}])
def test_the_document_knows_what_is_taken(condition: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(CONDITION).validate(condition)
    jsonschema.Draft202012Validator(REMASK).validate(
        {"condition": condition, "span": {"positions": [1, 2]}, "times": 2}
    )


@pytest.mark.parametrize(
    "remask",
    [
        {"condition": {"progress": {"above": 0.0, "at_most": None}}, "span": None, "times": None},
        {"condition": {"progress": {"above": 0.0}, "attribute": None, "not": None, "read": None}},
        {"condition": {"attribute": "a", "read": None, "over": None, "above": 1, "below": None, "all": None}},
    ],
)
def test_null_is_the_same_as_left_out_and_the_document_says_so(remask: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(REMASK).validate(remask)
    given = {name: one for name, one in remask["condition"].items() if one is not None}
    assert parse_remask(remask) == parse_remask({"condition": given})


@pytest.mark.parametrize(
    "remask",
    [
        {"condition": HALF, "spam": None},
        {"condition": HALF | {"progres": None}},
        {"condition": {"progress": {"above": 0.0, "most": None}}},
        {"condition": {"progress": None}},
        {"condition": None},
    ],
)
def test_a_field_that_is_not_known_is_not_left_out_by_null(remask: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert list(jsonschema.Draft202012Validator(REMASK).iter_errors(remask))
    with pytest.raises(ValueError, match="must|no field|required"):
        parse_remask(remask)


@pytest.mark.parametrize(
    ("steering", "param", "said"),
    [
        ({"abort_when": {"above": 1}}, "steering.abort_when", "exactly one of all, any, not, progress"),
        ({"abort_when": {"any": [HALF, {}]}}, "steering.abort_when", "any[1] must have exactly one"),
        ({"abort_when": 3}, "steering.abort_when", ""),
        ({"abort_when": {"attribute": "nope", "above": 1}}, "steering.abort_when", "unknown attribute 'nope'"),
        ({"remask_when": HALF}, "steering.remask_when", "no field 'progress'"),
        ({"remask_when": {"condition": HALF, "times": 17}}, "steering.remask_when", "from 1 to 16"),
        ({"interventions": [PUSH | {"when": {"all": []}}]}, "steering.interventions[0].when", "1 to 32 conditions"),
        (
            {"interventions": [PUSH | {"when": {"feature": {"sae": "x", "index": 0}, "above": 0}}]},
            "steering.interventions[0].when",
            "unknown sae 'x'",
        ),
        (
            {"interventions": [PUSH | {"schedule": "feedback", "op": "clamp"}]},
            "steering.interventions[0].op",
            "is for op 'add'",
        ),
        (
            {"interventions": [PUSH | {"schedule": "feedback", "strength": -1}]},
            "steering.interventions[0].strength",
            "above 0",
        ),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, steering: dict[str, Any], param: str, said: str) -> None:
    found, message = refusal(client, steering)
    assert found == param
    assert said in message


def test_a_deep_body_is_refused_and_not_descended_into(client: TestClient) -> None:
    condition: dict[str, Any] = HALF
    for _ in range(60):
        condition = {"not": condition}
    assert "8 levels" in refusal(client, {"abort_when": condition})[1]
