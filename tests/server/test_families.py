"""Every model family over HTTP, from a folder in its published layout to answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import EngineConfig, ModelConfig, ServerConfig
from steerserve.models import weights_sha256
from steerserve.runtime.load import load_runtime
from steerserve.server.app import create_app
from tests import tiny
from tests.calibrate.made import make_family, make_saes

PUSH = {"attribute": "topic/sports", "strength": 4.0, "schedule": "uniform"}
SAMPLERS: dict[str, list[dict[str, Any]]] = {
    "llada": [
        {"order": order, "transfer": "linear", "block_length": 4}
        for order in ("random", "confidence", "margin", "entropy", "sae_stability")
    ],
    "dream": [
        {"order": {"type": "confidence", "filtered": True}, "transfer": "timesteps"},
        {"order": {"type": "margin", "filtered": True, "alg_temp": 0.3}, "transfer": "timesteps"},
        {"order": "entropy", "transfer": "cosine"},
        {"order": "sae_stability", "transfer": "linear"},
        {"order": "random", "transfer": "origin"},
    ],
    "mdlm": [
        {"order": "random", "transfer": "ddpm_cache"},
        {"order": "random", "transfer": "ddpm"},
        {"order": "random", "transfer": {"type": "remdm", "eta": 0.3}},
        {"order": "entropy", "transfer": "linear"},
        {"order": "sae_stability", "transfer": "threshold"},
    ],
    "sedd": [{"order": "random", "transfer": "analytic"}, {"order": "random", "transfer": "euler"}],
}
SAMPLERS["mdlm-timed"] = SAMPLERS["mdlm"]
SAMPLERS["a2d-qwen3"] = [
    {"order": "confidence", "transfer": "linear", "block_length": 4},
    {"order": "entropy", "transfer": "cosine"},
]
SAMPLERS["lladamoe"] = [{"order": "confidence", "transfer": "linear", "block_length": 4}]
SAMPLERS["llada2"] = [
    {"order": "confidence", "transfer": {"type": "threshold", "value": 0.6}},
    {"order": "confidence", "transfer": {"type": "joint_threshold", "value": 0.3, "editing_threshold": 0.05}},
]
SAMPLERS["modernbert"] = [
    {"order": "confidence", "transfer": "linear"},
    {"order": "sae_stability", "transfer": "threshold", "block_length": 4},
]
SAMPLERS["sdar"] = [{"order": "confidence", "transfer": "threshold"}, {"order": "confidence", "transfer": "linear"}]
SAMPLERS["Fast_dLLM_Qwen"] = [{"order": "confidence", "transfer": {"type": "threshold", "value": 0.9}}]
SAMPLERS["gpt2"] = [{"order": "random", "transfer": "origin"}]
BLOCKS = ("llada2", "sdar", "Fast_dLLM_Qwen")
"""Families whose attention is causal between blocks."""
DENOISERS = {"gpt2": "bos_token=2"}
"""What is said of families whose published BOS the tokenizer here has not."""


@pytest.fixture(scope="module", params=sorted(SAMPLERS))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def client(family: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server over a checkpoint, SAEs of both policies and an attribute that belongs to them."""
    folder = tmp_path_factory.mktemp(family)
    model = make_family(folder / family, family, tiny_model)
    make_saes(folder / "saes", model)
    tiny.attribute(folder / "attributes", "topic/sports", (1,))
    card = folder / "attributes" / "attribute.json"
    raw = json.loads(card.read_text()) | {"model_sha256": weights_sha256(model)}
    for site in raw["sites"].values():
        site["sae"] = "not loaded"
    card.write_text(json.dumps(raw))
    config = ModelConfig(device="cpu", revision="r1", denoiser=DENOISERS.get(family))
    runtime = load_runtime(model, folder / "saes", [folder / "attributes"], EngineConfig(), config)
    with TestClient(create_app(runtime.service, ServerConfig())) as opened:
        yield opened


def answer(client: TestClient, family: str, diffusion: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {
        "model": family,
        "prompt": "the king won",
        "max_tokens": 12,
        "seed": 5,
        "temperature": 1.0,
        "logprobs": 0,
        "diffusion": {"steps": 6, "ignore_eos": True, **diffusion},
        **more,
    }
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def outcome(choice: dict[str, Any]) -> tuple[str, list[float]]:
    """Text and log-probabilities: a model of random weights may well take the same tokens under a push."""
    return choice["text"], choice["logprobs"]["token_logprobs"]


def test_the_model_is_described(client: TestClient, family: str) -> None:
    card, _ = client.get("/v1/models").json()["data"]
    assert card["id"] == family
    assert card["revision"] == "r1"
    assert card["dtype"] == "float32"
    assert len(card["sha256"]) == 64
    capabilities = client.get("/capabilities").json()
    assert capabilities["transfers"] and capabilities["orders"]


def test_every_sampler_steers_beside_its_baseline_with_receipt_and_trace(client: TestClient, family: str) -> None:
    for sampler in SAMPLERS[family]:
        [plain] = answer(client, family, sampler)["choices"]
        steering = {
            "interventions": [PUSH],
            "baseline": True,
            "receipt": "full",
            "trace": {"attributes": ["topic/sports"], "every": 2},
        }
        found = answer(client, family, sampler, steering=steering)
        [choice] = found["choices"]
        assert choice["baseline"]["text"] == plain["text"], sampler
        assert outcome(choice) != outcome(plain), sampler
        [receipt] = found["choices"][0]["steering"]["interventions"]
        assert receipt["applied"] is True
        [site] = receipt["sites"]
        assert site["positions_touched"] >= 12
        assert site["delta_ratio_max"] > 0
        assert len(receipt["strength_per_step"]) == found["choices"][0]["steering"]["forward_passes"]
        read = [entry["values"]["topic/sports"] for entry in choice["trace"]]
        assert read and all(isinstance(value, float) for value in read)
        unsteered = answer(client, family, sampler, steering={"interventions": [PUSH | {"strength": 0.0}]})
        assert outcome(unsteered["choices"][0]) == outcome(plain)


def test_features_and_raw_vectors_push_too(client: TestClient, family: str) -> None:
    sampler = SAMPLERS[family][0]
    [plain] = answer(client, family, sampler)["choices"]
    sae = client.get("/v1/saes").json()["data"][0]["name"]
    values = [1.0 if i % 3 else -1.0 for i in range(tiny.HIDDEN)]
    for push in (
        {"feature": {"sae": sae, "index": 3}, "op": "boost", "strength": 4.0},
        {"feature": {"sae": sae, "index": 3}, "strength": 30.0, "unit": "raw"},
        {"vector": {"layer": 0, "values": values}, "strength": 30.0, "unit": "raw", "scope": {"positions": [0, 12]}},
    ):
        found = answer(client, family, sampler, steering={"interventions": [push]})
        assert found["choices"][0]["steering"]["interventions"][0]["applied"] is True, push
        assert outcome(found["choices"][0]) != outcome(plain), push


def test_an_infill_keeps_its_surroundings(client: TestClient, family: str) -> None:
    if family in BLOCKS:
        return
    found = answer(client, family, SAMPLERS[family][0], suffix="and it rained")
    assert found["usage"]["prompt_tokens"] > 3
    assert len(found["choices"][0]["text"]) > 0


def test_a_stream_comes_to_the_text_of_the_answer(client: TestClient, family: str) -> None:
    for sampler in SAMPLERS[family]:
        whole = answer(client, family, sampler)["choices"][0]["text"]
        body = {
            "model": family,
            "prompt": "the king won",
            "max_tokens": 12,
            "seed": 5,
            "temperature": 1.0,
            "stream": True,
            "diffusion": {"steps": 6, "ignore_eos": True, **sampler},
        }
        lines = client.post("/v1/completions", json=body).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == whole


def test_every_stream_of_a_text_that_is_revised_comes_to_the_answer(client: TestClient, family: str) -> None:
    if family == "sedd":
        return
    block = 12 if family == "mdlm-timed" else 4
    sampler = {"order": "random", "transfer": {"type": "remdm", "eta": 0.4}, "block_length": block, "steps": 24}
    early, revised = 0, 0
    for seed in range(2):
        more: dict[str, Any] = {"seed": seed, "stop": ["e"] if seed % 2 else []}
        body = {"model": family, "prompt": "the king", "max_tokens": 12, "temperature": 1.0, "stream": True, **more}
        whole = answer(client, family, sampler, **more, prompt="the king")["choices"][0]["text"]
        told = {}
        for mode in ("append", "replace", "events"):
            diffusion = {"ignore_eos": True, **sampler, "stream_mode": mode}
            lines = client.post("/v1/completions", json=body | {"diffusion": diffusion}).text.splitlines()
            told[mode] = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        pieces = [chunk["choices"][0]["text"] for chunk in told["append"]]
        early += len([piece for piece in pieces if piece]) > 1
        assert "".join(pieces) == whole
        assert told["replace"][-1]["choices"][0]["text"] == whole
        assert told["events"][-1]["text"] == whole
        revised += sum(one["type"] == "revised" for one in told["events"])
        tokens: dict[int, int] = {}
        for one in told["events"]:
            if one["type"] == "committed":
                assert not tokens.keys() & set(one["positions"])
                tokens |= dict(zip(one["positions"], one["tokens"], strict=True))
            if one["type"] == "revised":
                for position in one["positions"]:
                    del tokens[position]
        if not more["stop"]:
            assert sorted(tokens) == list(range(12))
            last = [one["text"] for one in told["events"] if one["type"] in ("committed", "revised")][-1]
            assert last == whole
    assert revised > 4
    # Where a block begins in the prompt, nothing is told before the end.
    assert early > 0 or block == 12 or family in BLOCKS


def test_what_a_family_cannot_do_is_refused_with_the_reason(client: TestClient, family: str) -> None:
    refused: list[tuple[str, dict[str, Any]]] = (
        [
            ("diffusion.order", {"order": "confidence", "transfer": "analytic"}),
            ("diffusion.transfer", {"order": "random", "transfer": "linear"}),
            ("diffusion.cfg_scale", {"cfg_scale": 1.0}),
            ("diffusion.block_length", {"block_length": 4}),
        ]
        if family == "sedd"
        else [("diffusion.transfer", {"order": "random", "transfer": "analytic"})]
    )
    if family in BLOCKS:
        refused.append(("suffix", {}))
    if family == "mdlm-timed":
        refused.append(("diffusion.block_length", {"block_length": 4}))
    for field, diffusion in refused:
        body = {"model": family, "prompt": "the king", "max_tokens": 12, "diffusion": {"steps": 6, **diffusion}}
        body |= {"suffix": "and it rained"} if field == "suffix" else {}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
