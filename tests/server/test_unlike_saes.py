"""Two SAEs of one layer that are no pair, over HTTP: only what needs a pair is refused, by its field."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import TorchEngine
from steerserve.engine.features import LoadedFeatures
from steerserve.server.app import create_app
from tests import tiny
from tests.server.torch_service import service_of

PARAM = "steering.interventions[0]"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    model = tiny.bert()
    catalogue = tiny.catalogue(model, tmp_path_factory.mktemp("served"))
    saes = [
        *catalogue.saes.values(),
        tiny.sae(1, seed=4, policy="visible", features=40),
        tiny.sae(1, seed=5, policy=None, name="whole"),
    ]
    catalogue = replace(catalogue, saes={one.facts.id: one for one in saes})
    engine = TorchEngine(model, tiny.tokenizer(), catalogue, EngineConfig())
    service = replace(service_of(engine, "tiny"), features=LoadedFeatures(engine))
    with TestClient(create_app(service, ServerConfig()), raise_server_exceptions=False) as opened:
        yield opened


def body(steering: dict[str, Any] | None = None, order: Any = "confidence") -> dict[str, Any]:
    plain = {"model": "tiny", "prompt": "the king", "max_tokens": 8, "diffusion": {"steps": 4, "order": order}}
    return plain if steering is None else plain | {"steering": steering}


def push(sae: str, op: str) -> dict[str, Any]:
    unit = {} if op in ("boost", "multiply", "project_out") else {"unit": "raw"}
    return {"interventions": [{"feature": {"sae": sae, "index": 3}, "op": op, "strength": 0.5, **unit}]}


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/steering/preview"])
@pytest.mark.parametrize("sae", ["layer-1-mask", "layer-1-visible"])
@pytest.mark.parametrize("op", ["add", "multiply", "clamp", "project_out", "cap"])
def test_what_needs_one_sae_is_served(client: TestClient, op: str, sae: str, route: str) -> None:
    response = client.post(route, json=body(push(sae, op)))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/steering/preview"])
@pytest.mark.parametrize("sae", ["layer-1-mask", "layer-1-visible"])
def test_boost_is_refused_by_its_field_and_says_why(client: TestClient, sae: str, route: str) -> None:
    response = client.post(route, json=body(push(sae, "boost")))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, f"{PARAM}.op"), error
    assert "SAEs layer-1-mask and layer-1-visible are no pair: features 48 and 40" in error["message"]


@pytest.mark.parametrize("sae", ["layer-2-mask", "layer-2-visible", "whole"])
def test_boost_of_other_saes_is_served(client: TestClient, sae: str) -> None:
    response = client.post("/v1/completions", json=body(push(sae, "boost")))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "order",
    [
        "sae_stability",
        {"type": "sae_stability", "sae": "layer-1-mask"},
        {"type": "sae_stability", "sae": "layer-1-visible"},
        {"type": "sae_attribute", "attribute": "topic/sports"},
    ],
)
def test_orders_read_one_sae(client: TestClient, order: Any) -> None:
    response = client.post("/v1/completions", json=body(order=order))
    assert response.status_code == 200, response.text


def test_a_text_is_read_by_one_of_them_and_not_by_both(client: TestClient) -> None:
    asked = {"text": "the team won", "mask_ratio": 0.5, "k": 2}
    for sae in ("layer-1-mask", "layer-1-visible"):
        assert client.post("/v1/features/activations", json=asked | {"sae": sae}).status_code == 200
    assert client.post("/v1/features/activations", json=asked | {"layer": 2}).status_code == 200
    response = client.post("/v1/features/activations", json=asked | {"layer": 1})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "layer"), error
    assert "are no pair: features 48 and 40" in error["message"]


def test_a_trace_tells_a_clamped_latent_after_the_push(client: TestClient) -> None:
    sae = tiny.sae(1, seed=1)
    index = max(range(tiny.FEATURES), key=sae.own)
    feature = {"sae": "layer-1-mask", "index": index}
    steering = {
        "interventions": [{"feature": feature, "op": "clamp", "strength": 60.0, "unit": "raw"}],
        "trace": {"features": [feature], "every": 2},
    }
    response = client.post("/v1/completions", json=body(steering))
    assert response.status_code == 200, response.text
    told = response.json()["choices"][0]["trace"]
    assert [one["step"] for one in told] == [0, 2]
    for one in told:
        assert one["values"] == {f"layer-1-mask:{index}": pytest.approx(60.0, abs=1e-3)}


@pytest.mark.parametrize(
    ("trace", "param", "code"),
    [
        ({"features": [{"sae": "none", "index": 1}]}, "steering.trace.features[0].sae", 404),
        ({"features": [{"sae": "whole", "index": 4096}]}, "steering.trace.features[0].index", 404),
        ({"every": 2}, "steering.trace.attributes", 400),
    ],
)
def test_a_trace_of_nothing_that_is_there_is_refused(
    client: TestClient, trace: dict[str, Any], param: str, code: int
) -> None:
    response = client.post("/v1/completions", json=body({"trace": trace}))
    assert (response.status_code, response.json()["error"]["param"]) == (code, param), response.text
