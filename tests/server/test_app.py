import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from tests.server.text_engine import TextEngine, service_of, serving


def test_a_request_may_name_the_revision_of_the_model(client: TestClient) -> None:
    body = {"prompt": "the", "max_tokens": 4, "seed": 1}
    plain = client.post("/v1/completions", json=body | {"model": "text"}).json()
    for digits in ("01234567", "0123456789abcdef" * 4):
        answer = client.post("/v1/completions", json=body | {"model": f"text@{digits}"})
        assert answer.status_code == 200
        told = answer.json()
        assert told["choices"] == plain["choices"]
        assert (told["model"], told["system_fingerprint"]) == ("text", "fp_0123456789ab")
    for name, code in {
        "text@76543210": "revision_not_served",
        "text@0123": "not_found",
        "text@": "not_found",
        "other@01234567": "not_found",
    }.items():
        for path in ("/v1/completions", "/v1/steering/preview"):
            answer = client.post(path, json=body | {"model": name})
            assert answer.status_code == 404
            assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, "model")


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    model, named = listed["data"]
    assert model | {"id": "text", "object": "model", "created": 1_700_000_000, "max_model_len": 512} == model
    assert named == model | {"id": "text@0123456789ab", "root": "text"}
    for name in ("text", "text@01234567", "text@0123456789ab"):
        assert client.get(f"/v1/models/{name}").json() == model
    assert client.get("/v1/models/other").status_code == 404


def test_attributes_and_saes(client: TestClient) -> None:
    listed = client.get("/v1/attributes").json()["data"]
    assert [entry["name"] for entry in listed] == ["sentiment/positive", "topic/sports"]
    assert client.get("/v1/attributes/topic/sports").json() == listed[1]
    missing = client.get("/v1/attributes/topic/chess")
    assert missing.status_code == 404
    assert "topic/sports" in missing.json()["error"]["message"]
    assert client.get("/v1/saes").json()["data"] == [{"layer": 1, "width": 16, "name": "layer-1"}]


def test_capabilities(client: TestClient) -> None:
    found = client.get("/capabilities").json()
    assert found["operators"] == ["add"]
    assert found["server"]["stream_modes"] == ["append", "replace", "events"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/models/", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_unknown_routes_and_methods_have_the_envelope(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path, follow_redirects=False)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["type"] == "invalid_request_error"
    if status == 405:
        assert response.headers["allow"]


def test_request_id_is_echoed_or_made(client: TestClient) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for unsafe in (b"a b", b"x" * 200, "é".encode(), b""):
        made = client.get("/nope", headers={b"x-request-id": unsafe}).headers["x-request-id"]
        assert made.startswith("req-")


def test_health_and_readiness_before_start() -> None:
    client = TestClient(create_app(service_of(TextEngine()), ServerConfig()))
    assert client.get("/health").status_code == 503
    assert client.get("/ready").status_code == 503


def test_metrics_count_what_happened(engine: TextEngine) -> None:
    with serving(engine) as client:
        steering = {"interventions": [{"attribute": "topic/sports", "strength": 1}]}
        body = {"model": "text", "prompt": "abc", "max_tokens": 10, "seed": 2}
        done = client.post("/v1/completions", json=body | {"steering": steering}).json()
        client.post("/v1/completions", json=body | {"stream": True})
        client.post("/v1/completions", json=body | {"n": 0})
        client.get("/somewhere/else")
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    route = 'route="/v1/completions"'
    assert values[f'steerserve_requests_total{{code="200",{route}}}'] == "2.0"
    assert values[f'steerserve_requests_total{{code="400",{route}}}'] == "1.0"
    assert values['steerserve_requests_total{code="404",route="other"}'] == "1.0"
    assert values["steerserve_steered_requests_total"] == "1.0"
    assert values['steerserve_attribute_requests_total{attribute="topic/sports"}'] == "1.0"
    assert values['steerserve_attribute_requests_total{attribute="sentiment/positive"}'] == "0.0"
    assert values["steerserve_denoising_steps_total"] == "20.0"
    assert values["steerserve_forward_passes_total"] == "20.0"
    assert values["steerserve_prompt_tokens_total"] == "6.0"
    assert values["steerserve_tokens_total"] == str(2.0 * done["usage"]["completion_tokens"])
    assert values[f"steerserve_request_seconds_count{{{route}}}"] == "3.0"
    for per_step in ("step_seconds", "batch_rows", "batch_fill", "steering_configurations"):
        assert values[f"steerserve_{per_step}_count"] == "20.0"
    assert values["steerserve_batch_rows_sum"] == "20.0"
    assert values["steerserve_batch_fill_sum"] == str(20 / engine.max_rows)
    assert values["steerserve_steering_configurations_sum"] == "10.0"
    assert values["steerserve_time_to_first_token_seconds_count"] == "2.0"
    assert values["steerserve_queue_wait_seconds_count"] == "2.0"
    assert values["steerserve_queue_requests"] == values["steerserve_running_rows"] == "0.0"
    assert values["steerserve_queue_steps"] == "0.0"
    assert values["steerserve_ready"] == "1.0"


def test_pages_of_allowed_origins_may_call() -> None:
    with serving(TextEngine(), ServerConfig(cors_origin=("https://good.example",), drain_seconds=5)) as client:
        asked = {
            "origin": "https://good.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        }
        allowed = client.options("/v1/completions", headers=asked)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert client.options("/v1/completions", headers=asked | {"origin": "https://bad.example"}).status_code == 400
        body = {"model": "text", "max_tokens": 4}
        answer = client.post("/v1/completions", json=body, headers={"origin": "https://good.example"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        answer = client.post("/v1/completions", json=body, headers={"origin": "https://bad.example"})
        assert "access-control-allow-origin" not in answer.headers
    with serving(TextEngine()) as client:
        answer = client.get("/v1/models", headers={"origin": "https://good.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_two_apps_keep_their_metrics_apart() -> None:
    with serving(TextEngine()) as one, serving(TextEngine()) as other:
        one.post("/v1/completions", json={"model": "text", "max_tokens": 5})
        assert "steerserve_denoising_steps_total 5.0" in one.get("/metrics").text
        assert "steerserve_denoising_steps_total 0.0" in other.get("/metrics").text


def test_the_server_does_not_import_a_tensor_library() -> None:
    probe = (
        "import sys, threading; import steerserve.server.app;"
        "found = {'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules);"
        "assert not found, found; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
