"""Joint allocation, limits, measured KL and controls as plain HTTP requests, with and without keys."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.engine.engine import DiffusionEngine
from steerserve.server.app import create_app
from steerserve.steering.site import Site
from tests import tiny
from tests.engine import priced
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.torch_service import service_of

SPORTS = {"attribute": "topic/sports", "strength": 0.8}
ARCHAIC = {"attribute": "register/archaic", "strength": 0.5}
VECTOR = {"vector": {"layer": 1, "values": [1.0] * tiny.HIDDEN}, "strength": 9.0, "unit": "raw"}
REFUSE = {"max_delta": 0.01, "on_exceed": "refuse"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


@contextmanager
def serving(engine: DiffusionEngine, keys: Path | None = None) -> Iterator[TestClient]:
    service = service_of(engine, "tiny")
    with TestClient(create_app(service, ServerConfig(drain_seconds=5, keys=keys))) as client:
        client.headers["authorization"] = f"Bearer {SECRET}"
        yield client


@pytest.fixture(scope="module")
def client(engine: DiffusionEngine) -> Iterator[TestClient]:
    with serving(engine) as client:
        yield client


def post(client: TestClient, path: str = "/v1/completions", stream: bool = False, **steering: Any) -> Any:
    fields = {"model": "tiny", "prompt": "the king", "max_tokens": 12, "seed": 3}
    diffusion = {"steps": 6, "ignore_eos": True}
    return client.post(path, json=fields | {"diffusion": diffusion, "steering": steering, "stream": stream})


def predictions(client: TestClient) -> float:
    """How many predicted KLs the server has counted: tests of this file share it, in any order."""
    [count] = re.findall(r"^steerserve_steering_predicted_kl_count (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(count)


def test_a_preview_says_what_the_answer_s_receipt_finds(client: TestClient) -> None:
    before = predictions(client)
    asked: dict[str, Any] = {
        "interventions": [SPORTS, ARCHAIC],
        "combine": "joint",
        "limits": {"max_kl": 1.0, "max_predicted_kl": 0.002, "max_delta": 0.6},
        "measure_kl": True,
        "baseline": True,
        "receipt": "full",
    }
    [plan] = post(client, "/v1/steering/preview", **asked).json()["plans"]
    answer = post(client, **asked)
    assert answer.status_code == 200, answer.text
    receipt = answer.json()["choices"][0]["steering"]
    assert plan["predicted_kl"] == pytest.approx(0.002)
    assert receipt["predicted_kl"] == pytest.approx(0.002)
    assert receipt["limits"]["clipped"]["predicted_kl_scale"] == plan["limits"]["predicted_kl_scale"] < 1
    assert receipt["limits"]["holds"] == plan["limits"]["holds"]
    assert plan["limits"]["holds"] == {"max_kl": "measured_kl", "max_predicted_kl": "predicted_kl"}
    assert 0 < receipt["measured_kl"] <= 1.0
    assert plan["joint"]["rho"] == receipt["interventions"][0]["rho"] > 1
    assert plan["combine"] == receipt["combine"] == "joint"
    plain = post(client).json()["choices"][0]["text"]
    assert answer.json()["choices"][0]["baseline"]["text"] == plain
    assert predictions(client) == before + 1


def receipts(client: TestClient, steps: int, **fields: Any) -> list[dict[str, Any]]:
    """The receipts of the choices of an answer, in which there are no others."""
    steering = {"interventions": [SPORTS, ARCHAIC], "measure_kl": True} | fields.pop("steering", {})
    asked = {"model": "tiny", "prompt": "the king", "max_tokens": 24, "seed": 3, "steering": steering}
    answer = client.post("/v1/completions", json=asked | {"diffusion": {"steps": steps, "ignore_eos": True}} | fields)
    assert answer.status_code == 200, answer.text
    found = [choice["steering"] for choice in answer.json()["choices"]]
    assert answer.text.count('"interventions"') == len(found)
    return found


def numbers_and_hashes(told: Any) -> Iterator[Any]:
    """Lists of more than two numbers, and hashes, anywhere in a receipt."""
    if isinstance(told, dict):
        for value in told.values():
            yield from numbers_and_hashes(value)
    elif isinstance(told, list):
        if len(told) > 2 and all(isinstance(one, int | float) for one in told):
            yield told
        for one in told:
            yield from numbers_and_hashes(one)
    elif isinstance(told, str) and re.fullmatch("[0-9a-f]{64}", told):
        yield told


def test_a_receipt_is_told_once_a_choice_and_whole_on_request(client: TestClient) -> None:
    [short], [full] = receipts(client, 12), receipts(client, 12, steering={"receipt": "full"})
    assert not list(numbers_and_hashes(short)) and list(numbers_and_hashes(full))
    for name in ("predicted_kl", "measured_kl"):
        assert short[name] == pytest.approx(full[name], rel=1e-5) and full[name] is not None
    for little, whole in zip(short["interventions"], full["interventions"], strict=True):
        for name in ("name", "applied", "strength", "unit", "scope", "operator", "notes", "clipped"):
            assert little[name] == whole[name], name
        assert little["rho"] == pytest.approx(whole["rho"], rel=1e-5)
        assert little["schedule"]["type"] == whole["schedule"]["type"]
        strengths = whole["strength_per_step"]
        assert little["strength_range"] == [min(strengths), max(strengths)]
        for part, site in zip(little["sites"], whole["sites"], strict=True):
            assert part["layer"] == site["layer"] and part["positions_touched"] == site["positions_touched"]
            assert part["delta_ratio_max"] == pytest.approx(site["delta_ratio_max"], rel=1e-5)
    assert len(receipts(client, 12, n=3)) == 3
    # A receipt that is short stays so, however many steps there are.
    assert abs(len(json.dumps(receipts(client, 24)[0])) - len(json.dumps(short))) < 60


@pytest.mark.parametrize("form", ["short", "full"])
def test_streams_tell_the_receipt_in_the_same_form(client: TestClient, form: str) -> None:
    [receipt] = receipts(client, 12, steering={"receipt": form})
    steering = {"interventions": [SPORTS, ARCHAIC], "measure_kl": True, "receipt": form}
    asked = {"model": "tiny", "prompt": "the king", "max_tokens": 24, "seed": 3, "steering": steering, "stream": True}
    for mode in ("append", "events"):
        diffusion = {"steps": 12, "ignore_eos": True, "stream_mode": mode}
        text = client.post("/v1/completions", json=asked | {"diffusion": diffusion}).text
        frames = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        told = [one.get("steering") or one.get("choices", [{}])[0].get("steering") for one in frames]
        assert [one for one in told if one] == [receipt]


@pytest.mark.parametrize("control", ["random", "sign_flip", "matched_norm"])
def test_controls_stand_beside_a_baseline(client: TestClient, control: str) -> None:
    answer = post(client, interventions=[SPORTS | {"strength": 5.0}], control=control, baseline=True)
    assert answer.status_code == 200, answer.text
    receipt = answer.json()["choices"][0]["steering"]
    assert receipt["control"] == receipt["interventions"][0]["control"] == control
    plain = post(client).json()["choices"][0]["text"]
    assert answer.json()["choices"][0]["baseline"]["text"] == plain


@pytest.mark.parametrize(
    ("steering", "param"),
    [
        ({"combine": "joint", "interventions": [VECTOR]}, "steering.interventions[0]"),
        (
            {"combine": "joint", "interventions": [SPORTS | {"schedule": "uniform"}]},
            "steering.interventions[0].schedule",
        ),
        ({"limits": {"max_predicted_kl": 1.0}, "interventions": [VECTOR]}, "steering.limits.max_predicted_kl"),
        (
            {"limits": {"max_predicted_kl": 1e-6, "on_exceed": "refuse"}, "interventions": [SPORTS]},
            "steering.limits.max_predicted_kl",
        ),
        ({"control": "matched_norm", "interventions": [VECTOR]}, "steering.control"),
        ({"interventions": [VECTOR | {"unit": "kl"}]}, "steering.interventions[0].unit"),
        ({"interventions": [{"attribute": "plain", "unit": "kl", "strength": 1.0}]}, "steering.interventions[0].unit"),
    ],
)
def test_what_cannot_be_honoured_is_refused_where_it_stands(client: TestClient, steering: Any, param: str) -> None:
    for path in ("/v1/completions", "/v1/steering/preview"):
        answer = post(client, path, **steering)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_a_row_over_its_own_limit_is_the_request_s_fault(client: TestClient) -> None:
    answer = post(client, interventions=[VECTOR], limits=REFUSE)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("limit_exceeded", "steering.limits.max_delta")
    assert "0.01" in error["message"]
    streamed = post(client, stream=True, interventions=[VECTOR], limits=REFUSE)
    frames = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert frames[-1]["error"]["code"] == "limit_exceeded"


def test_a_row_over_its_measured_kl_is_the_request_s_fault(client: TestClient) -> None:
    limits = {"max_kl": 1e-3, "on_exceed": "refuse"}
    answer = post(client, interventions=[VECTOR], limits=limits)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "limit_exceeded", "steering.limits.max_kl")


def test_a_key_s_limit_on_kl_is_held_in_every_row(engine: DiffusionEngine, tmp_path: Path) -> None:
    with serving(engine, keys_file(tmp_path, entry(max_kl=0.05))) as client:
        for limits, most in ((None, 0.05), ({"max_kl": 1.0, "max_delta": 9.0}, 0.05), ({"max_kl": 0.01}, 0.01)):
            answer = post(client, interventions=[VECTOR], limits=limits)
            assert answer.status_code == 200, answer.text
            receipt = answer.json()["choices"][0]["steering"]
            assert receipt["limits"]["max_kl"] == most
            assert 0 < receipt["measured_kl"] <= most
        assert post(client).status_code == 200
        fields = {"model": "tiny", "prompt": "the king", "max_tokens": 12, "diffusion": {"cfg_scale": 1.0}}
        answer = client.post("/v1/completions", json=fields | {"steering": {"interventions": [VECTOR]}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (403, "diffusion.cfg_scale")


def test_a_key_s_limit_on_predicted_kl_is_judged_on_the_plan(engine: DiffusionEngine, tmp_path: Path) -> None:
    with serving(engine, keys_file(tmp_path, entry(max_predicted_kl=0.002))) as client:
        assert post(client, interventions=[SPORTS]).status_code == 403
        assert post(client, interventions=[VECTOR]).status_code == 403
        assert post(client, interventions=[SPORTS], control="random").status_code == 403
        assert post(client, interventions=[SPORTS], limits={"max_predicted_kl": 0.002}).status_code == 200
        assert post(client, interventions=[SPORTS | {"strength": 0.1}]).status_code == 200
        assert post(client).status_code == 200


def test_a_mandatory_push_is_out_of_their_reach(engine: DiffusionEngine, tmp_path: Path) -> None:
    mandatory = {"attribute": "topic/sports", "strength": 1.5}
    limits: dict[str, Any] = {"max_strength": {"residual": 1.0}, "max_loudness": 10.0, "max_overlap": 0.7}
    warm = {"attribute": "tone/warm", "strength": 0.3}
    with serving(engine, keys_file(tmp_path, entry(mandatory=[mandatory], **limits))) as client:
        alone = post(client).json()["choices"][0]["text"]
        [plain] = post(client, "/v1/steering/preview", interventions=[warm]).json()["plans"]
        for options in (
            {"control": "sign_flip"},
            {"limits": {"max_kl": 1e-3, "max_predicted_kl": 1e-5, "max_delta": 1e-4}},
            {"combine": "independent", "measure_kl": True},
        ):
            answer = post(client, interventions=[warm], baseline=True, **options)
            assert answer.status_code == 200, answer.text
            own, imposed = answer.json()["choices"][0]["steering"]["interventions"]
            assert imposed["mandatory"] is True
            assert imposed["clipped"] == 0
            assert "control" not in imposed
            [planned] = post(client, "/v1/steering/preview", interventions=[warm], **options).json()["plans"]
            assert planned["interventions"][1]["sites"] == plain["interventions"][1]["sites"]
            assert answer.json()["choices"][0]["baseline"]["text"] == alone
    closed = entry(mandatory=[mandatory], features=False, **limits)
    with serving(engine, keys_file(tmp_path, closed)) as client:
        answer = post(client, interventions=[warm], control="matched_norm")
        assert (answer.status_code, answer.json()["error"]["param"]) == (403, "steering.control")


@pytest.mark.parametrize("stream", [False, True])
def test_a_hook_that_stops_working_is_a_failure_and_counted(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def count() -> float:
        lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("steerserve_steering_failures_total "))

    assert post(client, interventions=[VECTOR]).status_code == 200
    before = count()
    with monkeypatch.context() as patch:
        patch.setattr(Site, "apply", lambda _, hidden: hidden)
        answer = post(client, stream=stream, interventions=[VECTOR])
        assert post(client, interventions=[VECTOR | {"strength": 0.0}]).status_code == 200
        assert post(client).status_code == 200
    if stream:
        frames = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        error = frames[-1]["error"]
    else:
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("steering_not_applied", "server_error")
    assert count() == before + 1
    assert "is not steered: its push at layer 1" in caplog.text
    assert post(client, interventions=[VECTOR]).status_code == 200


def test_negate_pushes_at_minus_the_attribute_s_own_strength(client: TestClient) -> None:
    def strength(**fields: Any) -> float:
        [plan] = post(client, "/v1/steering/preview", interventions=[{"attribute": "topic/sports"} | fields]).json()[
            "plans"
        ]
        found: float = plan["interventions"][0]["strength"]
        return found

    assert strength(negate=True) == -strength() < 0
    refused = post(client, interventions=[SPORTS | {"negate": True}])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "steering.interventions[0].negate"
