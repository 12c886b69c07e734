"""A service whose attributes have probes, all but one, and requests to it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient

from steerserve.engine.engine import TorchEngine
from steerserve.server.service import Service
from steerserve.steering.attribute import Attribute
from steerserve.steering.probe import Probe
from tests import tiny
from tests.server.text_engine import template
from tests.server.torch_service import service_of

SPORTS, OLD, MUTE = "topic/sports", "register/archaic", "topic/mute"
PUSH = {"attribute": SPORTS, "strength": 0.4}


def probed(attribute: Attribute, seed: int) -> Attribute:
    weights = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))
    return replace(attribute, probe=Probe(1 + seed % 2, weights, 0.1, accuracy=0.9, texts=8))


def probed_service(folder: Path) -> Service:
    engine = tiny.engine(tiny.bert(), folder)
    found = {name: probed(one, i) for i, (name, one) in enumerate(engine.catalogue.attributes.items())}
    mute = tiny.attribute(folder / "mute", MUTE, (1,), seed=3)
    catalogue = replace(engine.catalogue, attributes=found | {MUTE: mute})
    made = TorchEngine(engine.model, engine.tokenizer, catalogue, engine.config)
    return replace(service_of(made, "tiny"), chat=template)


def body(**fields: Any) -> dict[str, Any]:
    """A request whose receipts, where there are any, are whole."""
    if isinstance(fields.get("steering"), dict):
        fields["steering"] = {"receipt": "full"} | fields["steering"]
    shape = {"model": "tiny", "prompt": "the king", "max_tokens": 12, "seed": 5, "temperature": 1.0}
    return shape | {"diffusion": {"steps": 6, "order": "random"}} | fields


def answer(client: TestClient, path: str = "completions", **fields: Any) -> dict[str, Any]:
    asked = body(**fields)
    if path != "completions":
        del asked["prompt"]
    response = client.post(f"/v1/{path}", json=asked)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refusal(client: TestClient, **fields: Any) -> tuple[int, str, str]:
    responses = [client.post(f"/v1/{path}", json=body(**fields)) for path in ("completions", "steering/preview")]
    assert responses[0].json() == responses[1].json()
    error = responses[0].json()["error"]
    return responses[0].status_code, error["param"], error["message"]
