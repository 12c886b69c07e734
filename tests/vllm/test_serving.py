"""A server over vLLM: it says what it cannot do, refuses that, answers the rest, and does not start unsteered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from starlette.testclient import TestClient

from steerserve.config import BackendConfig, EngineConfig, ModelConfig, ServerConfig
from steerserve.errors import ArtifactError, SelfTestError
from steerserve.runtime.load import load_runtime
from steerserve.server.app import create_app
from tests.engine.alike import close
from tests.vllm import made

BACKEND = BackendConfig("vllm")
PUSH = {"feature": {"sae": "layer-1-mask", "index": 5}, "op": "clamp", "strength": 9.0, "unit": "raw"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("served")
    return made.write_model(folder / "model", "llada"), made.write_saes(folder / "saes")


@pytest.fixture(scope="module")
def client(folders: tuple[Path, Path]) -> Iterator[TestClient]:
    config = EngineConfig(max_rows=4)
    runtime = load_runtime(folders[0], folders[1], None, config, ModelConfig("float32"), backend=BACKEND)
    with TestClient(create_app(runtime.service, ServerConfig())) as opened:
        yield opened


def ask(client: TestClient, steering: dict[str, Any], **diffusion: Any) -> Any:
    body = {
        "model": "model",
        "prompt": "the king",
        "max_tokens": 16,
        "seed": 1,
        "temperature": 0.0,
        "diffusion": {"steps": 8, **diffusion},
        "steering": steering,
    }
    return client.post("/v1/completions", json=body)


def test_a_steered_answer_differs_from_its_baseline_and_says_what_was_applied(client: TestClient) -> None:
    answer = ask(client, {"interventions": [PUSH], "baseline": True})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert choice["text"] != choice["baseline"]["text"]
    [told] = answer.json()["choices"][0]["steering"]["interventions"]
    assert told["applied"]
    assert told["sites"][0]["positions_touched"] > 0


def test_the_torch_engine_answers_the_same(client: TestClient, folders: tuple[Path, Path]) -> None:
    runtime = load_runtime(folders[0], folders[1], None, EngineConfig(max_rows=4), ModelConfig("float32"))
    with TestClient(create_app(runtime.service, ServerConfig())) as other:
        texts = [ask(one, {"interventions": [PUSH], "baseline": True}).json()["choices"][0] for one in (client, other)]
        reading = {"text": "the king won", "layer": 2, "mask_ratio": 0.3}
        read = [one.post("/v1/features/activations", json=reading).json() for one in (client, other)]
    assert close(read[0], read[1])
    assert texts[0]["text"] == texts[1]["text"]
    assert texts[0]["baseline"]["text"] == texts[1]["baseline"]["text"]


def test_capabilities_say_what_is_refused_and_it_is(client: TestClient) -> None:
    told = client.get("/capabilities").json()
    assert told["engine"] == "vllm"
    refused = {"cache", "cfg_scale", "limits.max_kl", "measure_kl", "quality", "refine", "verdicts"}
    assert set(told["refused"]) == refused
    assert "max_kl" not in told["limits"]
    guided = ask(client, {}, cfg_scale=1.0)
    assert guided.status_code == 400
    assert guided.json()["error"]["param"] == "diffusion.cfg_scale"
    refined = ask(client, {"interventions": [PUSH], "rank": ["topic/sports"], "refine": {}})
    assert refined.status_code == 400
    assert refined.json()["error"]["param"] == "steering.refine"
    judged = ask(client, {"interventions": [PUSH], "quality": True})
    assert (judged.status_code, judged.json()["error"]["param"]) == (400, "steering.quality")


def test_a_server_whose_model_has_no_sites_does_not_start(folders: tuple[Path, Path]) -> None:
    with (
        patch("steerserve.engine.vllm.arguments.WORKER", "tests.vllm.siteless.SitelessWorker"),
        pytest.raises(SelfTestError, match="did not move the logits: steering does not take"),
    ):
        load_runtime(folders[0], None, None, EngineConfig(max_rows=2), ModelConfig("float32"), backend=BACKEND)


def test_an_option_that_vllm_does_not_have_is_refused_before_it_starts(folders: tuple[Path, Path]) -> None:
    backend = BackendConfig("vllm", vllm_arg=("frobnicate=1",))
    with pytest.raises(ArtifactError, match="this vLLM has no such option"):
        load_runtime(folders[0], None, None, EngineConfig(max_rows=2), ModelConfig("float32"), backend=backend)
