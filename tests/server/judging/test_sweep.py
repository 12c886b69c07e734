"""A sweep is its single requests in one, and tells what its texts came to."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.calibrate.trials.quality import text_losses
from steerserve.engine.outputs.quality import RATIOS, distinct_pairs
from steerserve.server.service import Service
from tests.server.probed import OLD, PUSH, SPORTS, answer, refusal

STEERING: dict[str, Any] = {"interventions": [PUSH, {"attribute": OLD, "strength": 0.2}], "rank": [SPORTS]}
WINDOW = {"type": "window", "start": 0.0, "stop": 0.5}
SWEEP: dict[str, Any] = {"attributes": [SPORTS, OLD], "schedules": ["uniform", WINDOW], "strengths": [0.3, 3.0]}


@pytest.fixture(scope="module")
def swept(client: TestClient) -> dict[str, Any]:
    return answer(client, steering=STEERING, sweep=SWEEP)


def test_its_texts_are_those_of_single_requests(client: TestClient, swept: dict[str, Any]) -> None:
    cells = swept["sweep"]["cells"]
    assert [(one["attribute"], one["schedule"], one["strength"]) for one in cells] == [
        (attribute, schedule, strength)
        for attribute in SWEEP["attributes"]
        for schedule in SWEEP["schedules"]
        for strength in SWEEP["strengths"]
    ]
    for cell, choice in zip(cells, swept["choices"], strict=True):
        first = {name: cell[name] for name in ("attribute", "schedule", "strength")}
        steering = STEERING | {"interventions": [first, STEERING["interventions"][1]], "quality": True}
        alone = answer(client, steering=steering)["choices"][0]
        assert alone["text"] == choice["text"]
        assert cell["index"] == choice["index"]
        assert alone["steering"]["quality"] == {name: cell[name] for name in ("loss", "distinct_pairs")}
        assert alone["steering"]["verdicts"] == cell["verdicts"]
        told = [(one["name"], one["strength"]) for one in choice["steering"]["interventions"]]
        assert told == [(cell["attribute"], cell["strength"]), (OLD, 0.2)]


def test_its_baseline_is_the_unsteered_text(client: TestClient, swept: dict[str, Any]) -> None:
    plain = answer(client)["choices"][0]
    assert swept["sweep"]["baseline"]["text"] == plain["text"]
    assert swept["sweep"]["baseline"]["verdicts"].keys() == {SPORTS}
    distances = {one["strength"]: one["distance"] for one in swept["sweep"]["cells"]}
    assert all(0 <= one <= 1 for one in distances.values()) and max(distances.values()) > 0
    same = [one["text"] == plain["text"] for one in swept["choices"]]
    assert same == [one["distance"] == 0 for one in swept["sweep"]["cells"]]


def test_a_text_may_be_swept_and_its_cells_are_planned(client: TestClient) -> None:
    sweep = {"strengths": [0.0, 1.0]}
    told = answer(client, steering=f"{SPORTS} + {OLD}@0.2", sweep=sweep | {"intervention": 1})
    assert [one["strength"] for one in told["sweep"]["cells"]] == [0.0, 1.0]
    body = {"model": "tiny", "max_tokens": 8, "steering": SPORTS, "sweep": sweep}
    planned = client.post("/v1/steering/preview", json=body).json()
    assert planned["rows"] == 3
    assert [one["interventions"][0]["strength"] for one in planned["plans"]] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"sweep": {}}, 400, "sweep"),
        ({"sweep": {"strengths": []}}, 400, "sweep.strengths"),
        ({"sweep": {"strengths": [1.0] * 65}}, 400, "sweep.strengths"),
        ({"sweep": {"strengths": [1.0] * 8, "schedules": ["uniform"] * 8}}, 400, "sweep"),
        ({"sweep": {"strengths": [0.1, 1e5]}}, 400, "sweep.strengths[1]"),
        ({"sweep": {"schedules": ["uniform", "x"]}}, 400, "sweep.schedules[1]"),
        ({"sweep": {"attributes": [SPORTS, "x"]}}, 404, "sweep.attributes[1]"),
        ({"sweep": {"strengths": [1.0], "intervention": 2}}, 400, "sweep.intervention"),
        ({"sweep": {"strengths": [1.0]}, "steering": {}}, 400, "sweep.intervention"),
        ({"sweep": {"strengths": [1.0]}, "n": 2}, 400, "n"),
        ({"sweep": {"strengths": [1.0]}, "prompt": ["a", "b"]}, 400, "prompt"),
        ({"sweep": {"strengths": [1.0]}, "stream": True}, 400, "stream"),
        ({"sweep": {"strengths": [1.0]}, "steering": STEERING | {"baseline": True}}, 400, "steering.baseline"),
    ],
)
def test_what_cannot_be_swept_is_refused(client: TestClient, fields: dict[str, Any], status: int, param: str) -> None:
    assert refusal(client, **{"steering": STEERING} | fields)[:2] == (status, param)


def test_quality_is_the_loss_of_the_text_under_the_unsteered_model(client: TestClient, service: Service) -> None:
    steering = {"interventions": [PUSH], "quality": True, "baseline": True}
    choice = answer(client, prompt=None, steering=steering, logprobs=0)["choices"][0]
    plain = answer(client, prompt=None, steering={"interventions": [PUSH]}, logprobs=0)
    told = choice["steering"]["quality"]
    engine: Any = service.engine
    ids = engine.tokenizer.encode(choice["text"], add_special_tokens=False).ids
    [expected] = text_losses(engine.model, [ids], RATIOS).tolist()
    assert told == {"loss": pytest.approx(expected, rel=1e-5), "distinct_pairs": distinct_pairs(ids)}
    assert choice["baseline"]["quality"].keys() == told.keys()
    assert plain["choices"][0]["text"] == choice["text"]
    assert "quality" not in plain["choices"][0]["steering"]
