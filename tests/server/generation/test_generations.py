"""Changing and ending a generation that runs."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import State
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from steerserve.config import ServerConfig
from steerserve.engine.api.text import continuation
from steerserve.errors import SteerserveError
from steerserve.server.errors import DeletedError, OverLimitError, RowFailedError, ShuttingDownError
from steerserve.server.generation.sse import lines
from steerserve.server.http.observe import Observe
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.telemetry.record import Visit
from tests.server.asgi import Call, running
from tests.server.gate import Gate
from tests.server.text_engine import END, TextEngine, decode

STEERED = {"steering": {"interventions": [{"attribute": "topic/sports", "strength": 1.0}]}}
BODY: dict[str, Any] = {"model": "text", "prompt": "a", "seed": 4, "max_tokens": 40}


class Change(Call):
    """A request of another method, with a body."""

    def __init__(self, method: str, name: str, body: Any = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"/v1/generations/{name}", body, headers=headers)
        self.scope["method"] = method


def frames(call: Call) -> list[dict[str, Any]]:
    lines = call.body.decode().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


async def asked(app: Any, changes: list[Any]) -> None:
    """Wait until each change has been answered or waits for the engine, which is held."""
    while len(app.state.worker._delivery.pending) < sum(not one.done() for one in changes):
        await asyncio.sleep(0.001)


async def began(app: Any, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[Call, Any, str]:
    """A stream that has begun: its call, its task and its id."""
    call = Call("/v1/completions", BODY | {"stream": True} | body, headers=headers)
    task = asyncio.create_task(call.run(app))
    while "x-generation-id" not in call.headers:
        await asyncio.sleep(0.001)
    return call, task, call.headers["x-generation-id"]


def scenario(*changes: tuple[str, Any], body: dict[str, Any] | None = None, steps: int = 5) -> tuple[list[Call], Call]:
    """A stream in which changes arrive while the engine is about to make a step; their calls, and the stream's."""

    async def run() -> tuple[list[Call], Call]:
        engine = TextEngine()
        gate = Gate(engine, steps)
        async with running(engine) as app:
            call, task, name = await began(app, {"diffusion": {"stream_mode": "events"}} | (body or {}))
            await gate.held()
            made: list[Call] = [Change(method, name, change) for method, change in changes]
            waiting = [asyncio.create_task(one.run(app)) for one in made]
            await asked(app, waiting)
            gate.open()
            await asyncio.gather(*waiting, task)
            return made, call

    return asyncio.run(run())


def test_new_interventions_hold_from_the_next_step() -> None:
    [patch], stream = scenario(("PATCH", STEERED), body={"steering": {"baseline": True}, "n": 2})
    assert patch.status == 200, patch.body
    answer = json.loads(patch.body)
    assert answer["object"] == "generation.steering"
    assert answer["rows"] == [{"index": 0, "from_step": 6}, {"index": 1, "from_step": 6}]
    assert answer["plans"] == [{"prompt": 0, "steps": 40, "interventions": [{"attribute": "topic/sports"}]}]
    told = frames(stream)
    assert {one["id"] for one in told} == {answer["id"]}
    steered = [one for one in told if one["type"] == "steered"]
    assert [(one["index"], one["baseline"], one["step"]) for one in steered] == [(0, False, 6), (1, False, 6)]
    for index in (0, 1):
        mine = [one for one in told if one["index"] == index and one["type"] == "committed"]
        tokens: list[dict[int, tuple[int, int]]] = [{}, {}]
        for one in mine:
            tokens[one["baseline"]] |= {
                p: (t, one["step"]) for p, t in zip(one["positions"], one["tokens"], strict=True)
            }
        for position, (token, step) in tokens[False].items():
            plain = tokens[True][position][0]
            letter = ord("a") <= plain <= ord("z")
            if plain < 128:
                assert token == (plain - 32 if letter and step >= 6 else plain)
    receipts = [one for one in told if one["type"] == "receipt"]
    assert [one["steering"] for one in receipts] == [{"interventions": [{"strength": 1.0, "from_step": 6}]}] * 2


def test_a_text_that_is_revised_can_be_steered() -> None:
    [patch], stream = scenario(
        ("PATCH", STEERED), body={"diffusion": {"stream_mode": "events", "transfer": "remdm"}}, steps=12
    )
    assert patch.status == 200, patch.body
    told = frames(stream)
    kinds = [one["type"] for one in told]
    assert "revised" in kinds[: kinds.index("steered")]
    assert "revised" in kinds[kinds.index("steered") :]
    tokens: dict[int, int] = {}
    for one in told:
        if one["type"] == "committed":
            tokens |= dict(zip(one["positions"], one["tokens"], strict=True))
        if one["type"] == "revised":
            for position in one["positions"]:
                del tokens[position]
    said = [tokens[position] for position in sorted(tokens)]
    said = said[: said.index(END)] if END in said else said
    assert told[-1]["text"] == continuation(decode, list(BODY["prompt"].encode()), said)


def test_earlier_interventions_stay_in_the_receipt() -> None:
    [patch], stream = scenario(("PATCH", {"steering": {"interventions": []}}), body=STEERED)
    assert patch.status == 200
    [receipt] = [one for one in frames(stream) if one["type"] == "receipt"]
    assert receipt["steering"] == {"interventions": [{"strength": 1.0, "until_step": 6}]}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"steering": {"interventions": [{"attribute": "nope"}]}}, 404, "steering.interventions[0].attribute"),
        (
            {"steering": {"interventions": [{"attribute": "a", "strenght": 1}]}},
            400,
            "steering.interventions[0].strenght",
        ),
        ({"steering": {}}, 400, "steering.interventions"),
        ({"steering": {"baseline": True, "interventions": []}}, 400, "steering.baseline"),
        ({"diffusion": {}}, 400, "diffusion"),
        ({}, 400, "steering"),
        ([], 400, None),
    ],
)
def test_a_bad_change_is_refused_and_changes_nothing(body: Any, status: int, param: str | None) -> None:
    [patch], stream = scenario(("PATCH", body))
    assert patch.status == status, patch.body
    assert json.loads(patch.body)["error"]["param"] == param
    kinds = [one["type"] for one in frames(stream)]
    assert "steered" not in kinds
    assert kinds[-1] == "done"


def test_a_deleted_stream_ends_in_an_error_and_may_be_deleted_again() -> None:
    [first, second, patch], stream = scenario(("DELETE", None), ("DELETE", None), ("PATCH", STEERED), body={"n": 2})
    name = frames(stream)[0]["id"]
    for call in (first, second):
        assert (call.status, json.loads(call.body)) == (
            200,
            {"id": name, "object": "generation.deleted", "deleted": True},
        )
    assert patch.status == 404
    assert frames(stream)[-1]["error"]["code"] == "deleted"
    assert b"[DONE]" not in stream.body
    assert stream.complete


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DeletedError("deleted"), ("invalid", 410)),
        (OverLimitError("over", "steering.limits.max_kl"), ("invalid", 422)),
        (ShuttingDownError("ends", 1.0), ("refused", 503)),
        (RowFailedError("failed"), ("failed", 500)),
    ],
)
def test_a_stream_that_ends_early_is_reported_as_what_ended_it(error: SteerserveError, told: tuple[str, int]) -> None:
    visits: list[Visit] = []

    class Ended:
        async def events(self, _: float) -> AsyncIterator[None]:
            yield None
            raise error

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        source = lines(Ended(), None, False, 1.0, State(scope["state"]))  # type: ignore[arg-type]
        await StreamingResponse(source)(scope, receive, send)

    async def run() -> None:
        await Observe(app, Metrics(), [visits.append])(Call("/").scope, Call("/").receive, Call("/").send)

    asyncio.run(run())
    assert [(visit.outcome, visit.code) for visit in visits] == [told]


def test_whoever_waits_for_a_whole_answer_is_told() -> None:
    async def run() -> tuple[Call, Call, TextEngine]:
        engine = TextEngine()
        gate = Gate(engine, 3)
        async with running(engine) as app:
            call = Call("/v1/completions", BODY)
            task = asyncio.create_task(call.run(app))
            await gate.held()
            # The id of an answer that is not a stream is told with it alone; the server's own list has it before.
            [name] = app.state.generations.running
            delete = await Change("DELETE", name).run(app)
            gate.open()
            await task
            again = await Change("DELETE", name).run(app)
            assert again.status == delete.status == 200
            return call, delete, engine

    call, _, engine = asyncio.run(run())
    assert call.status == 410
    assert json.loads(call.body)["error"]["code"] == "deleted"
    assert len(engine.aborted) == 1
    assert not engine.running


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_what_does_not_run_is_a_404(client: TestClient, method: str) -> None:
    done = client.post("/v1/completions", json=BODY).json()["id"]
    for name in (done, "cmpl-nope", "..", "a" * 1000):
        response = client.request(method, f"/v1/generations/{name}", json=STEERED)
        assert response.status_code == 404
        assert len(response.json()["error"]["message"]) < 300


def test_the_path_tells_both_methods(client: TestClient) -> None:
    response = client.get("/v1/generations/x")
    assert response.status_code == 405
    assert {one.strip() for one in response.headers["allow"].split(",")} == {"PATCH", "DELETE"}


def test_generations_of_another_key_are_not_there(tmp_path: Path) -> None:
    entries = [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ("one", "other")]
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": entries}))
    one, other = ({"authorization": f"Bearer {name}"} for name in ("one", "other"))

    async def run() -> list[int]:
        engine = TextEngine()
        gate = Gate(engine, 3)
        async with running(engine, ServerConfig(drain_seconds=5, keys=keys)) as app:
            _, task, name = await began(app, {}, one)
            await gate.held()
            refused = [await Change(method, name, STEERED, other).run(app) for method in ("PATCH", "DELETE")]
            taken = await Change("DELETE", name, headers=one).run(app)
            gate.open()
            await task
            after = await Change("DELETE", name, headers=other).run(app)
            return [call.status for call in (*refused, taken, after)]

    assert asyncio.run(run()) == [404, 404, 200, 404]


def test_a_key_that_runs_all_it_may_at_once_can_steer_it_and_end_it(tmp_path: Path) -> None:
    entry = {"name": "one", "sha256": hashlib.sha256(b"one").hexdigest(), "max_concurrent": 1}
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [entry]}))
    mine = {"authorization": "Bearer one"}

    async def run() -> list[Call]:
        engine = TextEngine()
        gate = Gate(engine, 3)
        async with running(engine, ServerConfig(drain_seconds=5, keys=keys)) as app:
            _, task, name = await began(app, {}, mine)
            await gate.held()
            patch = Change("PATCH", name, STEERED, mine)
            waiting = asyncio.create_task(patch.run(app))
            await asked(app, [waiting])
            another = [Change("PATCH", name, STEERED, mine), Call("/v1/completions", BODY, headers=mine)]
            for one in another:
                await one.run(app)
            gate.let(1)
            await waiting
            delete = await Change("DELETE", name, headers=mine).run(app)
            gate.open()
            await task
            return [patch, *another, delete, await Call("/v1/completions", BODY, headers=mine).run(app)]

    calls = asyncio.run(run())
    assert [one.status for one in calls] == [200, 429, 429, 200, 200]
    assert ["retry-after" in one.headers for one in calls] == [False, True, True, False, False]


def test_a_change_that_an_ending_engine_cannot_make_is_answered() -> None:
    async def run() -> tuple[Call, Call]:
        engine = TextEngine()
        gate = Gate(engine, 3)
        async with running(engine) as app:
            call, task, name = await began(app, {})
            await gate.held()
            app.state.worker.stop()
            patch = Change("PATCH", name, STEERED)
            waiting = asyncio.create_task(patch.run(app))
            await asked(app, [waiting])
            gate.open()
            await asyncio.gather(waiting, task)
            return call, patch

    call, patch = asyncio.run(run())
    assert patch.status == 503
    assert patch.headers["retry-after"]
    assert frames(call)[-1]["error"]["code"] == "shutting_down"
