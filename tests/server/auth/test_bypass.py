"""What a caller might try against the limits of a key: each attempt is refused, or changes nothing."""

import asyncio
import gzip
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.admission.interventions.resolve import overlaps
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.server import routes
from steerserve.server.app import create_app
from steerserve.server.auth.guard import under_policy
from tests import tiny
from tests.server import torch_service
from tests.server.asgi import Call, running
from tests.server.gate import Gate
from tests.server.planned_engine import SECRET, PlannedEngine, entry, keys_file
from tests.server.sockets import PATIENCE
from tests.server.text_engine import TextEngine, service_of

MANDATORY = {"attribute": "topic/sports", "strength": 0.5}
APPLIED = Intervention(attribute="topic/sports", strength=0.5, schedule="uniform", mandatory=True)
BOUND: dict[str, Any] = {"mandatory": [MANDATORY], "max_strength": {"residual": 1.0}, "max_loudness": 2.0}
OWN = {"attribute": "sentiment/positive", "strength": 0.4}


@contextmanager
def serving(folder: Path, engine: TextEngine, *entries: dict[str, Any], **config: Any) -> Iterator[TestClient]:
    settings = ServerConfig(drain_seconds=5, keys=keys_file(folder, *entries), **config)
    with TestClient(create_app(service_of(engine), settings)) as client:
        client.headers["authorization"] = f"Bearer {SECRET}"
        yield client


def post(client: TestClient, path: str = "/v1/completions", **fields: Any) -> Any:
    return client.post(path, json={"model": "text", "max_tokens": 12, "seed": 3} | fields)


ROWS: list[dict[str, Any]] = [
    {},
    {"steering": None},
    {"steering": {}},
    {"steering": {"interventions": []}},
    {"steering": {"interventions": None}},
    {"steering": {"interventions": [OWN | {"strength": 0}]}},
    {"steering": {"interventions": [OWN]}},
    {"steering": {"baseline": True}},
    {"steering": {"interventions": [OWN], "baseline": True}},
    {"prompt": ["a", "b"], "n": 2},
    {"prompt": ["a", "b"], "best_of": 3},
    {"best_of": 3, "steering": {"rank": ["-sentiment/positive"], "baseline": True}},
    {"stream": True},
    {"stream": True, "steering": {"baseline": True}},
    {"diffusion": {"steps": 1}},
    {"suffix": "x"},
]


def test_a_mandatory_intervention_is_in_every_row(tmp_path: Path) -> None:
    engine = PlannedEngine({})
    with serving(tmp_path, engine, entry(**BOUND)) as client:
        for fields in ROWS:
            engine.added.clear()
            answer = post(client, **fields)
            assert answer.status_code == 200, answer.text
            assert engine.added, fields
            assert all(request.params.interventions[-1] == APPLIED for request in engine.added), fields
            # The text engine shouts where it is steered.
            assert answer.text.count("naïve") == 0, fields
            if not fields.get("stream"):
                choices = answer.json()["choices"]
                texts = [choice["text"] for choice in choices]
                texts += [choice["baseline"]["text"] for choice in choices if "baseline" in choice]
                assert all(text == text.upper() for text in texts), fields


AGAINST: list[dict[str, Any]] = [
    # The same direction: taken away, turned round, or set.
    MANDATORY | {"strength": -0.5},
    MANDATORY | {"strength": -0.01},
    MANDATORY | {"op": "project_out", "strength": 1.0},
    MANDATORY | {"op": "clamp", "strength": 0.0, "unit": "residual"},
    MANDATORY | {"op": "cap", "strength": 0.0, "unit": "residual"},
    MANDATORY | {"strength": -0.5, "layers": [1]},
    MANDATORY | {"strength": -0.5, "direction": "diff_means"},
    MANDATORY | {"strength": -0.5, "scope": {"positions": [0, 12]}},
    MANDATORY | {"strength": -0.5, "schedule": "window"},
    # Another direction that points the same way, or reads the state.
    {"attribute": "topic/opposite", "strength": 0.5},
    {"attribute": "sentiment/positive", "op": "clamp", "strength": 0.0},
    {"attribute": "sentiment/positive", "op": "project_out", "strength": 1.0},
    # A direction spelt out.
    {"vector": {"layer": 1, "values": [-1.0, 0.0]}, "strength": 0.5},
    {"feature": {"sae": "layer-1", "index": 3}, "strength": -0.5},
    {"feature": {"sae": "layer-1", "index": 3}, "op": "multiply", "strength": 0.0},
    # So loud that nothing else is heard.
    OWN | {"strength": 1.01},
    OWN | {"strength": -1.01},
    OWN | {"strength": 0.3, "schedule": "window"},
    OWN | {"strength": 0.5, "unit": "raw"},
    OWN | {"strength": 1e6, "unit": "raw"},
    OWN | {"schedule": "feedback"},
]


def test_a_mandatory_intervention_is_not_cancelled_or_out_shouted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.server.text_engine.ATTRIBUTES", ("topic/sports", "sentiment/positive", "topic/opposite"))
    engine = PlannedEngine({frozenset(("topic/sports", "topic/opposite")): -0.9})
    with serving(tmp_path, engine, entry(**BOUND)) as client:
        for path in ("/v1/completions", "/v1/steering/preview"):
            for own in AGAINST:
                refused = post(client, path, steering={"interventions": [own]})
                assert refused.status_code == 403, (own, refused.text)
                error = refused.json()["error"]
                assert (error["type"], error["code"]) == ("permission_error", "policy"), own
                assert error["param"].startswith("steering.interventions"), own
                # Nor behind one that is allowed.
                assert post(client, path, steering={"interventions": [OWN, own]}).status_code == 403, own
            assert post(client, path, steering={"interventions": [OWN]}).status_code == 200
    assert all(request.params.interventions[-1] == APPLIED for request in engine.added)


FOREIGN = [
    {"neuronpedia": {"features": [{"source": "layer-1", "index": 3, "strength": -9.0}]}},
    {"ember": {"interventions": [{"mode": "pin", "features": {"features": [{"index_in_sae": 3}]}, "value": 0.0}]}},
]


@pytest.mark.parametrize("steering", FOREIGN)
def test_another_language_is_no_way_round(tmp_path: Path, steering: dict[str, Any]) -> None:
    with serving(tmp_path, PlannedEngine({}), entry(**BOUND)) as client:
        assert post(client, steering=steering).status_code in (400, 403)
        assert client.get("/metrics").text.count('steerserve_requests_total{code="200",route="/v1/completions"}') == 0


def test_a_generation_that_runs_is_changed_within_the_policy_and_by_its_own_key(tmp_path: Path) -> None:
    engine = PlannedEngine({})
    gate = Gate(engine, 3)
    keys = keys_file(tmp_path, entry(**BOUND), entry("other", "other-secret"))

    async def scenario() -> tuple[list[int], Call]:
        async with running(engine, ServerConfig(drain_seconds=5, keys=keys)) as app:
            body = {"model": "text", "max_tokens": 40, "stream": True, "diffusion": {"stream_mode": "events"}}
            mine = {"authorization": f"Bearer {SECRET}"}
            call = Call("/v1/completions", body, headers=mine)
            task = asyncio.create_task(call.run(app))
            await gate.held()
            await asyncio.wait_for(call.first_byte.wait(), PATIENCE)
            path = f"/v1/generations/{json.loads(call.body.split(b'data: ')[1])['id']}"

            async def change(method: str, own: list[Any], headers: dict[str, str]) -> int:
                made = Call(path, {"steering": {"interventions": own}}, headers=headers)
                made.scope["method"] = method
                return (await made.run(app)).status

            against = [MANDATORY | {"strength": -0.5}]
            found = [await change(method, [], headers={}) for method in ("PATCH", "DELETE")]
            other = {"authorization": "Bearer other-secret"}
            found += [await change(method, [], other) for method in ("PATCH", "DELETE")]
            found += [await change("PATCH", against, mine)]
            allowed = asyncio.create_task(change("PATCH", [], mine))
            while not app.state.worker._commands.qsize():
                await asyncio.sleep(0.001)
            gate.open()
            found += [await allowed]
            await task
            return found, call

    found, call = asyncio.run(scenario())
    assert found == [401, 401, 404, 404, 403, 200]
    assert call.body.endswith(b"data: [DONE]\n\n")
    [row] = engine.added
    assert row.params.interventions == (APPLIED,)


def test_small_pushes_do_not_add_up_to_a_loud_one(tmp_path: Path) -> None:
    with serving(tmp_path, PlannedEngine({}), entry(**BOUND)) as client:
        assert post(client, steering={"interventions": [OWN | {"strength": 0.25}] * 4}).status_code == 200
        assert post(client, steering={"interventions": [OWN | {"strength": 0.25}] * 5}).status_code == 403


@pytest.mark.parametrize("cosines", [{}, None])
def test_without_a_limit_or_without_overlaps_a_caller_pushes_nothing(tmp_path: Path, cosines: Any) -> None:
    limits: dict[str, Any] = {} if cosines is not None else {"max_strength": {"residual": 1.0}}
    with serving(tmp_path, PlannedEngine(cosines), entry(mandatory=[MANDATORY], **limits)) as client:
        assert post(client, steering={"interventions": [OWN]}).status_code == 403
        assert post(client).status_code == 200


def test_guidance_that_could_drown_it_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, PlannedEngine({}), entry(**BOUND), entry("free", "other")) as client:
        assert post(client, diffusion={"cfg_scale": 50.0}).status_code == 403
        assert post(client, diffusion={"cfg_scale": 0.0}).status_code == 200


def test_the_count_of_interventions_includes_those_of_the_key(tmp_path: Path) -> None:
    class Few(PlannedEngine):
        def admit(self, params: GenerationParams) -> Any:
            from steerserve.errors import RequestError

            if len(params.interventions) > 2:
                raise RequestError("at most 2 interventions, got 3", "interventions")
            return super().admit(params)

    with serving(tmp_path, Few({}), entry(**BOUND)) as client:
        refused = post(client, steering={"interventions": [OWN, OWN]})
    assert refused.status_code == 400
    assert "1 of them this key's own" in refused.json()["error"]["message"]


def test_nothing_is_admitted_for_nobody() -> None:
    with pytest.raises(PermissionError, match="a caller who is not known"):
        under_policy(TextEngine().admit)(GenerationParams())


def test_no_route_knows_the_engine() -> None:
    """They are given the `admit` that is bound to the policy, and a service whose engine is the worker's."""
    for path in Path(routes.__file__).parent.glob("*.py"):
        assert "service.engine" not in path.read_text(encoding="utf-8"), path


class OverlappingEngine(DiffusionEngine):
    """Tells the overlaps of what it admits."""

    def admit(self, params: GenerationParams) -> Any:
        request = super().admit(params)
        request.plan["overlaps"] = overlaps(request.interventions)
        return request


def attempts(engine: DiffusionEngine, name: str) -> list[dict[str, Any]]:
    """Pushes against a mandatory attribute at its own layer and at every other one."""
    attribute = engine.catalogue.attributes[name]
    direction = attribute.directions[attribute.layers[0], "sae"]
    return [
        {"attribute": name, "strength": -0.1},
        *(
            {"vector": {"layer": layer, "values": (direction * sign * size).tolist()}, "strength": -0.1 * sign}
            for layer in engine.catalogue.residual_norms
            for sign, size in ((1, 7.0), (-1, 0.01))
        ),
    ]


def test_the_torch_engine_holds_it_and_its_receipt_says_so(tmp_path: Path) -> None:
    model = tiny.bert()
    engine = OverlappingEngine(model, tiny.tokenizer(), tiny.catalogue(model, tmp_path / "attributes"), EngineConfig())
    name = "topic/sports"
    bound: dict[str, Any] = {
        "mandatory": [{"attribute": name, "strength": 0.5}],
        "max_strength": {"residual": 1.0},
        "vectors": True,
    }
    settings = ServerConfig(drain_seconds=5, keys=keys_file(tmp_path, entry(**bound), entry("free", "free-secret")))
    with TestClient(create_app(torch_service.service_of(engine), settings)) as client:
        client.headers["authorization"] = f"Bearer {SECRET}"
        for own in attempts(engine, name):
            refused = post(client, steering={"interventions": [own]})
            assert refused.status_code == 403, refused.text
            assert "cosine" in refused.json()["error"]["message"]
        [plan] = post(client, "/v1/steering/preview").json()["plans"]
        assert [one["mandatory"] for one in plan["interventions"]] == [True]
        answer = post(client, steering={"baseline": True}).json()
        [done] = answer["choices"][0]["steering"]["interventions"]
        assert (done["name"], done["mandatory"], done["applied"]) == (name, True, True)
        assert answer["choices"][0]["baseline"]["text"] == answer["choices"][0]["text"]
        client.headers["authorization"] = "Bearer free-secret"
        steering = {"interventions": [{"attribute": name, "strength": 0.5, "schedule": "uniform"}]}
        same = post(client, steering=steering).json()
        assert same["choices"][0]["text"] == answer["choices"][0]["text"]
        assert "mandatory" not in same["choices"][0]["steering"]["interventions"][0]


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    f"Bearer  {SECRET}",
    f"Bearer {SECRET} ",
    f"Bearer {SECRET},{SECRET}",
    f"Bearer {SECRET}x",
    f"Bearer {SECRET[:-1]}",
    f"Bearer {SECRET.upper()}",
    f"Bearer\t{SECRET}",
    f"Basic {SECRET}",
    f"Token {SECRET}",
    SECRET,
    f"Bearer {SECRET}\x00",
    f"Bearer {SECRET}\xe9",
    f"Bearer \xa0{SECRET}",
    "Bearer " + "k" * 513,
    "Bearer null",
    "Bearer none",
]


def test_a_wrong_key_is_a_401_that_tells_nothing(tmp_path: Path) -> None:
    engine = TextEngine()
    paths = ("/v1/completions", "/v1/models", "/metrics", "/capabilities", "/nope", "/")

    async def scenario() -> list[tuple[str, str | None, Call]]:
        config = ServerConfig(drain_seconds=5, keys=keys_file(tmp_path, entry()))
        async with running(engine, config) as app:
            calls = []
            for path, header in itertools.product(paths, WRONG):
                headers = {} if header is None else {"authorization": header}
                calls.append((path, header, await Call(path, {"model": "text"}, headers=headers).run(app)))
            return calls

    for path, header, call in asyncio.run(scenario()):
        assert call.status == 401, (path, header)
        error = json.loads(call.body)["error"]
        assert (error["code"], error["param"]) == ("invalid_api_key", None), (path, header)
        assert call.headers["www-authenticate"].startswith("Bearer "), (path, header)
        assert SECRET[:8] not in call.body.decode(), (path, header)
        # Nothing of the body was read.
        assert call.received == 0, (path, header)
    assert not engine.steps


def test_the_scheme_has_no_case(tmp_path: Path) -> None:
    with serving(tmp_path, TextEngine(), entry()) as client:
        for scheme in ("Bearer", "bearer", "BEARER"):
            client.headers["authorization"] = f"{scheme} {SECRET}"
            assert client.get("/v1/models").status_code == 200, scheme


def test_two_headers_are_none(tmp_path: Path) -> None:
    async def scenario() -> list[Call]:
        async with running(TextEngine(), ServerConfig(drain_seconds=5, keys=keys_file(tmp_path, entry()))) as app:
            calls = []
            good, bad = f"Bearer {SECRET}".encode(), b"Bearer wrong"
            for pair in ((good, bad), (bad, good), (good, good)):
                call = Call("/v1/completions", {"model": "text"})
                call.scope["headers"] = [(b"authorization", pair[0]), (b"authorization", pair[1])]
                calls.append(await call.run(app))
            elsewhere = Call("/v1/completions", {"model": "text"}, headers={"x-api-key": SECRET, "api-key": SECRET})
            elsewhere.scope["query_string"] = f"api_key={SECRET}&key={SECRET}".encode()
            return [*calls, await elsewhere.run(app)]

    assert [call.status for call in asyncio.run(scenario())] == [401] * 4


PATHS = [
    "//v1/completions",
    "/v1//completions",
    "/v1/completions/",
    "/V1/completions",
    "/v1/Completions",
    "/./v1/completions",
    "/health/../v1/completions",
    "/health/",
    "/health/v1/completions",
    "//health",
    "/HEALTH",
    "/health;/v1/completions",
    "/health?/v1/completions",
    "/health%2f..%2fv1/completions",
    "/%76%31/completions",
    "/metrics/../health",
    "/ready\x00",
    "/ready ",
    "health",
    "",
]


def test_other_spellings_of_a_path_reach_nothing(tmp_path: Path) -> None:
    async def scenario() -> list[tuple[str, Call, Call]]:
        async with running(TextEngine(), ServerConfig(drain_seconds=5, keys=keys_file(tmp_path, entry()))) as app:
            key = {"authorization": f"Bearer {SECRET}"}
            return [
                (
                    path,
                    await Call(path, {"model": "text"}).run(app),
                    await Call(path, {"model": "text"}, headers=key).run(app),
                )
                for path in PATHS
            ]

    for path, without, with_key in asyncio.run(scenario()):
        assert without.status == 401, path
        assert with_key.status in (404, 405), path


def test_health_and_readiness_need_no_key_and_metrics_do(tmp_path: Path) -> None:
    with serving(tmp_path, TextEngine(), entry()) as client:
        assert client.get("/metrics").status_code == 200
        del client.headers["authorization"]
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 401]
    with serving(tmp_path, TextEngine(), entry(), metrics_port=0) as client:
        assert client.get("/metrics").status_code == 404


def test_methods_are_no_way_round(tmp_path: Path) -> None:
    with serving(tmp_path, TextEngine(), entry(rate_per_minute=1)) as client:
        assert post(client).status_code == 200
        for method in ("POST", "PATCH"):
            assert client.request(method, "/v1/completions", json={"model": "text"}).status_code == 429
        override = {"x-http-method-override": "POST"}
        assert client.get("/v1/completions", headers=override).status_code == 405
        assert client.get("/v1/models").status_code == 200


def test_compressed_bodies_are_refused_unread() -> None:
    bomb = gzip.compress(b'{"model": "text", "prompt": "' + b"a" * 10_000_000 + b'"}')
    encodings = ("gzip", "GZIP", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x")

    async def scenario() -> list[tuple[str, str, Call]]:
        async with running(TextEngine()) as app:
            return [
                (path, encoding, await Call(path, chunks=[bomb], headers={"content-encoding": encoding}).run(app))
                for path in ("/v1/completions", "/v1/steering/preview")
                for encoding in encodings
            ]

    for path, encoding, call in asyncio.run(scenario()):
        told = (call.status, json.loads(call.body)["error"]["code"])
        assert told == (415, "unsupported_encoding"), (path, encoding)
        assert call.received == 0, (path, encoding)


def test_a_compressed_body_that_does_not_say_so_is_no_json() -> None:
    with TestClient(create_app(service_of(TextEngine()), ServerConfig(drain_seconds=5))) as client:
        assert client.post("/v1/completions", content=gzip.compress(b'{"model": "text"}')).status_code == 400
        identity = {"content-encoding": "identity"}
        assert client.post("/v1/completions", json={"model": "text"}, headers=identity).status_code == 200


def test_limits_of_one_key_are_not_those_of_another(tmp_path: Path) -> None:
    denied = entry("denied", "denied-secret", denied_attributes=["topic/*"], rate_per_minute=100)
    with serving(tmp_path, PlannedEngine({}), entry(rate_per_minute=2), denied) as client:
        own = {"interventions": [{"attribute": "topic/sports", "strength": 0.5}]}
        assert [post(client, steering=own).status_code for _ in range(3)] == [200, 200, 429]
        refused = post(client)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        client.headers["authorization"] = "Bearer denied-secret"
        refused = post(client, steering=own)
        assert refused.status_code == 403
        assert refused.json()["error"]["param"] == "steering.interventions[0].attribute"
        refused = post(client, best_of=2, steering={"rank": ["-topic/sports"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "steering.rank[0]")
        assert post(client).status_code == 200


def test_a_request_that_ends_makes_room_for_the_next(tmp_path: Path) -> None:
    with serving(tmp_path, TextEngine(), entry(max_concurrent=1)) as client:
        assert [post(client, stream=stream).status_code for stream in (True, False, True, False)] == [200] * 4
        assert post(client, model="other").status_code == 404
        assert post(client).status_code == 200


def test_a_server_without_keys_takes_any(tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    with TestClient(create_app(service_of(TextEngine()), ServerConfig(drain_seconds=5))) as client:
        for header in ({}, {"authorization": "Bearer none"}, {"authorization": "nonsense"}):
            assert client.get("/v1/models", headers=header).status_code == 200
