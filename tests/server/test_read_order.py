"""An order that reads the attribute which is pushed reads it in the baseline too, and after the push is gone."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.engine.engine import TorchEngine
from steerserve.server.app import create_app
from tests import tiny
from tests.server.asgi import Call
from tests.server.gate import Gate
from tests.server.generation.test_generations import Change, asked
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.text_engine import with_chat
from tests.server.torch_service import service_of

SPORTS = {"attribute": "topic/sports", "strength": 3.0}
ARCHAIC = {"attribute": "register/archaic", "strength": 3.0}
WARM = {"vector": {"name": "warm"}, "strength": 0.5}
READS = {"type": "sae_attribute", "weight": 0.8}
FIELDS: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "seed": 3}
PROMPT = {"prompt": "the king"}
MESSAGES = {"messages": [{"role": "user", "content": "the king"}]}


class Held(TorchEngine):
    """The real engine, which a Gate can hold before a step."""

    def before_step(self) -> None:
        """Set by the Gate."""

    def step(self) -> list[Any]:
        self.before_step()
        return super().step()


def app_of(folder: Path, keys: Path | None = None) -> tuple[Held, FastAPI]:
    made = tiny.engine(tiny.bert(), folder)
    engine = Held(made.model, made.tokenizer, made.catalogue, made.config)
    return engine, create_app(with_chat(service_of(engine, "tiny")), ServerConfig(drain_seconds=5, keys=keys))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    _, app = app_of(tmp_path_factory.mktemp("tiny"))
    with TestClient(app) as client:
        yield client


def body_of(order: Any, *interventions: dict[str, Any], **steering: Any) -> dict[str, Any]:
    diffusion = {"order": order, "transfer": "linear", "steps": 12, "ignore_eos": True}
    return FIELDS | {"diffusion": diffusion, "steering": {"interventions": list(interventions)} | steering}


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("path", "given"), [("/v1/completions", PROMPT), ("/v1/chat/completions", MESSAGES)], ids=["completion", "chat"]
)
@pytest.mark.parametrize("order", ["sae_attribute", READS], ids=["name", "options"])
def test_the_baseline_reads_the_attribute_that_is_pushed(
    client: TestClient, path: str, given: dict[str, Any], order: Any
) -> None:
    steered = post(client, path, given | body_of(order, WARM, SPORTS, ARCHAIC, baseline=True))["choices"][0]
    named = ({"type": order} if isinstance(order, str) else order) | {"attribute": "topic/sports"}
    plain = post(client, path, given | body_of(named))["choices"][0]
    told = plain["message"] if "message" in plain else plain["text"]
    assert (steered["baseline"]["message"] if "message" in steered else steered["baseline"]["text"]) == told
    alone = post(client, path, given | body_of(order, WARM, SPORTS, ARCHAIC))["choices"][0]
    assert steered["finish_reason"] == alone["finish_reason"]
    assert [steered.get(name) for name in ("text", "message")] == [alone.get(name) for name in ("text", "message")]


@pytest.mark.parametrize("given", [PROMPT, MESSAGES], ids=["completion", "chat"])
def test_the_plan_names_the_attribute_that_is_read(client: TestClient, given: dict[str, Any]) -> None:
    for order, named in (("sae_attribute", {"type": "sae_attribute"}), (READS, READS)):
        answer = post(client, "/v1/steering/preview", given | body_of(order, WARM, SPORTS, ARCHAIC, baseline=True))
        assert answer["rows"] == 2
        assert answer["plans"][0]["order"] == named | {"attribute": "topic/sports"}
    own = READS | {"attribute": "register/archaic"}
    answer = post(client, "/v1/steering/preview", given | body_of(own, SPORTS, baseline=True))
    assert answer["plans"][0]["order"] == own


@pytest.mark.parametrize("baseline", [False, True])
def test_without_an_attribute_to_read_the_request_is_refused(client: TestClient, baseline: bool) -> None:
    answer = client.post("/v1/completions", json=PROMPT | body_of("sae_attribute", WARM, baseline=baseline))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "diffusion.order")
    assert "name one in the order, or push one" in answer.json()["error"]["message"]


def changed(folder: Path, body: dict[str, Any], *changes: list[dict[str, Any]], **key: Any) -> Any:
    """What is told of changes to a running generation, and its events; key: the fields of the caller's."""
    keys = keys_file(folder, entry(**key)) if key else None
    headers = {"authorization": f"Bearer {SECRET}"}

    async def run() -> tuple[list[Change], Call]:
        (folder / "made").mkdir()
        engine, app = app_of(folder / "made", keys)
        gate = Gate(engine, 3)  # type: ignore[arg-type]
        async with app.router.lifespan_context(app):
            call = Call("/v1/completions", body | {"stream": True}, headers=headers)
            task = asyncio.create_task(call.run(app))
            await gate.held()
            name = call.headers["x-generation-id"]
            made = [Change("PATCH", name, {"steering": {"interventions": one}}, headers) for one in changes]
            waiting = [asyncio.create_task(one.run(app)) for one in made]
            await asked(app, waiting)
            gate.open()
            await asyncio.gather(*waiting, task)
            return made, call

    made, call = asyncio.run(run())
    assert [one.status for one in made] == [200] * len(made), [one.body for one in made]
    lines = call.body.decode().split("\n\n")
    return [json.loads(one.body) for one in made], [
        json.loads(line[6:]) for line in lines if line.startswith("data: {")
    ]


def test_a_change_leaves_the_order_with_what_it_reads(tmp_path: Path) -> None:
    body = PROMPT | body_of("sae_attribute", SPORTS)
    body["diffusion"]["stream_mode"] = "events"
    told, events = changed(tmp_path, body, [], [ARCHAIC], [])
    read = {"type": "sae_attribute", "attribute": "topic/sports"}
    assert [one["plans"][0]["order"] for one in told] == [read] * 3
    assert events[-1]["type"] == "done"


def test_an_order_that_reads_what_a_key_pushes_goes_on_reading_it(tmp_path: Path) -> None:
    key = {
        "mandatory": [ARCHAIC | {"strength": 0.4, "schedule": "uniform"}],
        "denied_attributes": ["register/*"],
        "max_strength": {"residual": 0.1},
        "max_overlap": 0.9,
    }
    body = PROMPT | body_of("sae_attribute", baseline=True)
    body["diffusion"]["stream_mode"] = "events"
    push = {"attribute": "topic/sports", "strength": 0.01, "schedule": "uniform"}
    told, events = changed(tmp_path, body, [push], [], **key)
    read = {"type": "sae_attribute", "attribute": "register/archaic"}
    assert [one["plans"][0]["order"] for one in told] == [read] * 2
    assert events[-1]["type"] == "done"
