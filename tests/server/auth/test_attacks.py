"""Attacks on a mandatory intervention over the torch engine, in every language and on every route that pushes: each is
refused or, where something is let through, leaves the mandatory push as it is and stays small beside it."""

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.api.events import Event
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import TorchEngine
from steerserve.engine.request.intervention import Resolved
from steerserve.engine.request.request import Request
from steerserve.server.app import create_app
from steerserve.server.auth.policy import Policy
from steerserve.server.errors import PolicyError
from steerserve.server.service import Service
from tests import tiny
from tests.server.asgi import Call
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.sockets import PATIENCE
from tests.server.torch_service import service_of

NAME = "topic/sports"
BY_ATTRIBUTE: dict[str, Any] = {
    "mandatory": [{"attribute": NAME, "strength": 0.5}],
    "max_strength": {"residual": 1.0},
    "vectors": True,
    "features": True,
}
BY_FEATURE: dict[str, Any] = {
    "mandatory": [{"feature": {"sae": "layer-1-mask", "index": 3}, "strength": 4.0, "unit": "stored", "scope": "all"}],
    "max_strength": {"stored": 2.0},
    "vectors": True,
    "features": True,
    "max_overlap": 0.5,
}
FEATURE_KEY = "sk-by-feature"


class HeldEngine(TorchEngine):
    """Keeps what it admits; with `steps_left` set, waits for `opened` once they are made."""

    def __init__(self, *built: Any) -> None:
        super().__init__(*built)
        self.admissions: list[Request] = []
        self.steps_left: int | None = None
        self.opened = threading.Event()

    def admit(self, params: GenerationParams) -> Request:
        request = super().admit(params)
        self.admissions.append(request)
        return request

    def step(self) -> list[Event]:
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                assert self.opened.wait(PATIENCE)
        return super().step()


def chatting(engine: TorchEngine) -> Service:
    return replace(service_of(engine), chat=lambda messages: " ".join(message["content"] for message in messages))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> HeldEngine:
    model = tiny.bert()
    catalogue = tiny.catalogue(model, tmp_path_factory.mktemp("attributes"))
    return HeldEngine(model, tiny.tokenizer(), catalogue, EngineConfig())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bound = entry("attribute", SECRET, **BY_ATTRIBUTE), entry("feature", FEATURE_KEY, **BY_FEATURE)
    return keys_file(tmp_path_factory.mktemp("keys"), *bound)


@pytest.fixture(scope="module")
def client(engine: HeldEngine, keys: Path) -> Iterator[TestClient]:
    with TestClient(create_app(chatting(engine), ServerConfig(drain_seconds=5, keys=keys))) as made:
        made.headers["authorization"] = f"Bearer {SECRET}"
        yield made


def against(engine: TorchEngine) -> list[dict[str, Any]]:
    """Everything that could take a push along the attribute's direction back, or drown it."""
    attribute = engine.catalogue.attributes[NAME]
    direction = attribute.directions[attribute.layers[0], "sae"]
    features = [{"uuid": "1", "label": "x", "index_in_sae": 3}]

    def own(**fields: Any) -> dict[str, Any]:
        return {"interventions": [fields]}

    def ember(mode: str, value: float) -> dict[str, Any]:
        edit = {"mode": mode, "features": {"features": features}, "value": value}
        return {"ember": {"sae": "layer-1-mask", "controller": {"interventions": [edit]}}}

    def neuronpedia(method: str, strength: float) -> dict[str, Any]:
        pushed = {"model": "text", "source": "layer-1-mask", "index": 3, "strength": strength}
        return {"neuronpedia": {"features": [pushed], "strengthMultiplier": 4.0, "steerMethod": method}}

    def easysteer(scale: float, normalize: bool) -> dict[str, Any]:
        vector = {"source": "a/warm.gguf", "scale": scale, "normalize": normalize, "apply": {"generation": "all"}}
        return {"easysteer": {"vectors": [vector]}}

    return [
        own(attribute=NAME, strength=-0.5),
        own(attribute=NAME, strength=-0.01, schedule="uniform", scope="all"),
        own(attribute=NAME, strength=0.5),
        own(attribute=NAME, op="clamp", strength=-1.0, unit="residual"),
        own(attribute=NAME, op="cap", strength=0.0, unit="residual"),
        own(attribute=NAME, op="project_out", strength=1.0),
        own(attribute="register/archaic", op="clamp", strength=-1.0, unit="residual"),
        own(attribute="register/archaic", strength=1.0),
        own(
            attribute="register/archaic",
            strength=0.1,
            layers=[0],
            schedule={"type": "window", "start": 0.0, "stop": 0.05},
        ),
        own(feature={"sae": "layer-1-mask", "index": 3}, op="multiply", strength=0.0),
        own(feature={"sae": "layer-1-mask", "index": 3}, op="boost", strength=5.0),
        own(vector={"name": "warm"}, strength=1.0),
        own(vector={"name": "warm"}, strength=1.0, unit="raw"),
        *(
            own(vector={"layer": layer, "values": (direction * size).tolist()}, strength=sign * 0.1, scope=scope)
            for layer in engine.catalogue.residual_norms
            for size, sign, scope in ((1e-30, -1, "all"), (1e30, 1, "masked"), (-1.0, 1, {"positions": [0, 4]}))
        ),
        *(ember(mode, value) for mode, value in (("nudge", -1.0), ("pin", 0.0), ("pin", -1.0), ("mul", 0.0))),
        *(neuronpedia(m, -5.0) for m in ("SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP")),
        *(easysteer(scale, normalize) for scale in (-2.0, 100.0) for normalize in (False, True)),
    ]


CARRIERS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "the"}),
    ("/v1/completions", {"prompt": ["the", "a"], "n": 2, "logprobs": 1, "echo": True}),
    ("/v1/completions", {"prompt": "the", "stream": True, "diffusion": {"stream_mode": "events"}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}], "stream": True, "n": 2}),
    ("/v1/steering/preview", {"prompt": "the"}),
    ("/v1/steering/preview", {"messages": [{"role": "user", "content": "the"}]}),
]


def post(client: TestClient, path: str, **fields: Any) -> Any:
    return client.post(path, json={"model": "text", "max_tokens": 8, "seed": 3} | fields)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(("path", "fields"), CARRIERS)
def test_no_language_and_no_route_pushes_against_it(
    client: TestClient, engine: HeldEngine, path: str, fields: dict[str, Any], baseline: bool
) -> None:
    for steering in against(engine):
        refused = post(client, path, **fields, steering=steering | {"baseline": baseline})
        # Not 400: it has to be the policy that refuses, and not a slip in what is tried.
        assert refused.status_code == 403, (steering, refused.text)
        assert refused.json()["error"]["param"].startswith("steering.")


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(("path", "fields"), CARRIERS[:5])
def test_every_row_is_pushed_and_its_unsteered_twin_as_well(
    client: TestClient, engine: HeldEngine, path: str, fields: dict[str, Any], baseline: bool
) -> None:
    engine.admissions.clear()
    answer = post(client, path, **fields, steering={"baseline": baseline})
    assert answer.status_code == 200, answer.text
    assert engine.admissions
    for request in engine.admissions:
        [pushed] = [push.applied for one in request.interventions for push in one.pushes]
        assert pushed.steps == 8
    if baseline and not fields.get("stream"):
        for choice in answer.json()["choices"]:
            text, twin = (
                one["text"] if "text" in one else one["message"]["content"] for one in (choice, choice["baseline"])
            )
            # The twin differs in the caller's own pushes alone, and here there are none.
            assert twin == text


def test_a_generation_that_runs_is_not_turned_against_it(engine: HeldEngine, keys: Path, client: TestClient) -> None:
    undisturbed = post(client, "/v1/completions", prompt="the", max_tokens=24).json()["choices"][0]["text"]
    held = HeldEngine(engine.model, engine.tokenizer, engine.catalogue, engine.config)
    held.steps_left = 4
    mine = {"authorization": f"Bearer {SECRET}"}

    async def scenario() -> tuple[list[int], bytes]:
        app = create_app(chatting(held), ServerConfig(drain_seconds=5, keys=keys))
        async with app.router.lifespan_context(app):
            body = {"model": "text", "prompt": "the", "max_tokens": 24, "seed": 3, "stream": True}
            call = Call("/v1/completions", body, headers=mine)
            task = asyncio.create_task(call.run(app))
            await asyncio.wait_for(_until(lambda: bool(app.state.generations.running)), PATIENCE)
            [name] = app.state.generations.running
            found = []
            for steering in against(held):
                change = Call(f"/v1/generations/{name}", {"steering": steering}, headers=mine)
                change.scope["method"] = "PATCH"
                found.append((await change.run(app)).status)
            held.opened.set()
            await task
            return found, call.body

    found, streamed = asyncio.run(scenario())
    assert set(found) == {403}
    frames = [json.loads(one.removeprefix(b"data: ")) for one in streamed.split(b"\n\n")[:-2]]
    assert "".join(choice["text"] for frame in frames for choice in frame["choices"]) == undisturbed


async def _until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.001)


vectors = st.builds(
    lambda layer, values: {"layer": layer, "values": values},
    st.integers(0, 2),
    st.lists(st.floats(-2, 2).filter(lambda v: abs(v) > 1e-3), min_size=tiny.HIDDEN, max_size=tiny.HIDDEN),
)
sources = st.one_of(
    st.sampled_from([{"attribute": NAME}, {"attribute": "register/archaic"}, {"vector": {"name": "warm"}}]),
    st.builds(
        lambda sae, index: {"feature": {"sae": sae, "index": index}},
        st.sampled_from(["layer-1-mask", "layer-2-mask", "layer-2-visible"]),
        st.integers(1, 8),
    ),
    st.builds(lambda vector: {"vector": vector}, vectors),
)
schedules = st.sampled_from(
    ["uniform", "commitment", "optimal", "feedback", {"type": "window", "start": 0.0, "stop": 0.1}]
)
wild = st.builds(
    lambda source, strength, rest: source | {"strength": strength} | rest,
    sources,
    st.floats(-2, 2),
    st.fixed_dictionaries(
        {},
        optional={
            "op": st.sampled_from(["add", "clamp", "cap", "project_out", "multiply", "boost"]),
            "unit": st.sampled_from(["residual", "stored", "raw", "max_act"]),
            "scope": st.sampled_from(["all", "prompt", "masked", "committed", {"positions": [0, 3]}]),
            "schedule": schedules,
            "layers": st.sampled_from([[0], [2], [0, 2]]),
            "direction": st.just("diff_means"),
        },
    ),
)
mild = st.builds(
    lambda source, strength, schedule: source | {"strength": strength} | schedule,
    sources.filter(lambda source: source != {"attribute": NAME}),
    st.floats(-0.15, 0.15),
    st.fixed_dictionaries({}, optional={"schedule": schedules}),
)
"""Much of which is allowed, in a key's own unit."""


def peak(one: Resolved, along: Any = None) -> float:
    """How large its pushes are at their largest gain, layers added up; along a direction, or in all."""
    total = 0.0
    for push in one.pushes:
        share = 1.0 if along is None else abs(float(push.direction.double() @ along.double()))
        total += abs(push.strength) * float(push.gains.abs().max()) * share
    return total


@given(
    st.one_of(st.lists(mild, min_size=1, max_size=4), st.lists(wild, min_size=1, max_size=4)),
    st.sampled_from([(SECRET, "residual", 0.2), (FEATURE_KEY, "stored", 0.5)]),
)
def test_whatever_is_let_through_stays_small_beside_it(
    client: TestClient, engine: HeldEngine, own: list[dict[str, Any]], key: tuple[str, str, float]
) -> None:
    secret, unit, overlap = key
    own = [{"unit": unit} | one if one.get("op", "add") in ("add", "clamp", "cap") else one for one in own]
    engine.admissions.clear()
    headers = {"authorization": f"Bearer {secret}"}
    body = {"model": "text", "prompt": "the", "max_tokens": 8, "steering": {"interventions": own}}
    answer = client.post("/v1/steering/preview", json=body, headers=headers)
    assert answer.status_code in (200, 400, 403, 404), answer.text
    if answer.status_code != 200:
        return
    [request] = engine.admissions
    *mine, mandatory = request.interventions
    [push] = mandatory.pushes
    assert push.op == "add" and float(push.gains.min()) == float(push.gains.max()) == 1.0
    assert sum(map(peak, mine)) <= 0.5 * abs(push.strength) * (1 + 1e-6)
    assert sum(peak(one, push.direction) for one in mine) <= overlap * 0.5 * abs(push.strength) * (1 + 1e-6)


@dataclass(frozen=True)
class NewIntervention(Intervention):
    """An intervention of a later version."""

    louder: float | None = None


def test_a_way_to_push_that_is_not_judged_is_refused_beside_it() -> None:
    policy = Policy(mandatory=(Intervention(attribute=NAME, strength=0.5),), max_strength={"residual": 1.0})
    for louder in (None, 2.0):
        own = NewIntervention(attribute="register/archaic", strength=0.1, louder=louder)
        params = GenerationParams(interventions=(own,))
        assert Policy().apply(params) == params
        if louder is None:
            added = tuple(replace(one, mandatory=True) for one in policy.mandatory)
            assert policy.apply(params).interventions == (own, *added)
        else:
            with pytest.raises(PolicyError, match="louder may not be set") as error:
                policy.apply(params)
            assert error.value.param == "interventions[0].louder"
