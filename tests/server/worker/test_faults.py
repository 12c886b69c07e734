import asyncio
import json
import logging
import threading
from typing import Any

import pytest

from steerserve.config import ServerConfig
from steerserve.engine.api.events import Event, Failed
from steerserve.engine.api.params import GenerationParams
from steerserve.errors import QueueFullError
from steerserve.server.errors import EngineDownError
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.worker.load import Load
from steerserve.server.worker.worker import EngineWorker
from tests.server.asgi import Call, running
from tests.server.gate import Gate
from tests.server.sockets import PATIENCE
from tests.server.text_engine import TextEngine, TextRequest, serving

BODY: dict[str, Any] = {"model": "text", "max_tokens": 30}


def get(path: str) -> Call:
    call = Call(path, chunks=[b""])
    call.scope["method"] = "GET"
    return call


def worker_of(engine: TextEngine) -> EngineWorker:
    return EngineWorker(engine, Load(engine.load, Metrics()))


def fail_at(engine: TextEngine, step: int) -> None:
    def before_step() -> None:
        if engine.steps == step:
            raise RuntimeError("secret detail")

    engine.before_step = before_step


@pytest.mark.parametrize("step", [0, 5])
def test_a_failing_step_ends_every_request_and_the_server_says_so(step: int) -> None:
    engine = TextEngine(max_rows=2)
    fail_at(engine, step)

    async def scenario() -> tuple[list[Call], list[Call]]:
        async with running(engine) as app:
            calls = [Call("/v1/completions", BODY | {"stream": i % 2 == 1}) for i in range(6)]
            await asyncio.gather(*(call.run(app) for call in calls))
            after = [Call("/v1/completions", BODY), get("/health"), get("/ready")]
            await asyncio.gather(*(call.run(app) for call in after))
            return calls, after

    calls, after = asyncio.run(scenario())
    for index, call in enumerate(calls):
        assert call.complete
        assert b"secret" not in call.body
        if call.status == 200:
            assert index % 2 == 1
            last = call.body.split(b"\n\n")[-2].removeprefix(b"data: ")
            assert json.loads(last)["error"]["code"] == "generation_failed"
            assert b"[DONE]" not in call.body
        else:
            assert call.status in (500, 503)
            assert json.loads(call.body)["error"]["message"] == "the engine failed"
    for call in after:
        assert call.status == 503
        assert int(call.headers["retry-after"]) >= 1
    assert engine.closed


def test_a_failing_row_is_a_500_and_its_sisters_are_freed() -> None:
    class OneRowFails(TextEngine):
        def step(self) -> list[Event]:
            events = super().step()
            if self.steps == 3:
                self.running.pop(1)
                events.append(Failed("row-2", "no finite logits"))
            return events

    engine = OneRowFails()
    gate = Gate(engine, 3)
    with serving(engine) as client:
        response = client.post("/v1/completions", json=BODY | {"n": 3})
        gate.open()
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "no finite logits"
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=BODY).status_code == 200
    assert sorted(engine.aborted) == ["row-1", "row-3"]


@pytest.mark.parametrize("stream", [False, True])
def test_no_room_in_the_queue_is_a_503_with_retry_after_and_adds_nothing(stream: bool) -> None:
    class Crowded(TextEngine):
        """Others take its room just before the first rows come."""

        crowd: list[TextRequest]

        def add(self, requests: list[TextRequest]) -> None:
            theirs, self.crowd = self.crowd, []
            self.waiting += theirs
            try:
                super().add(requests)
            finally:
                self.waiting = [one for one in self.waiting if one not in theirs]

    engine = Crowded(max_queue=4)
    engine.crowd = [engine.admit(GenerationParams(max_tokens=4)) for _ in range(3)]
    with serving(engine) as client:
        response = client.post("/v1/completions", json=BODY | {"n": 2, "stream": stream})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert response.headers["retry-after-ms"] == "2500"
        assert response.json()["error"]["code"] == "overloaded"
        assert client.post("/v1/completions", json=BODY | {"n": 3, "stream": stream}).status_code == 200
    assert len(engine.finished) == 3


def test_readiness_follows_the_queue_and_liveness_does_not() -> None:
    engine = TextEngine(max_queue=2)
    gate = Gate(engine, 0)

    async def scenario() -> list[Call]:
        async with running(engine) as app:
            before = await get("/ready").run(app)
            full = asyncio.create_task(Call("/v1/completions", BODY | {"n": 2}).run(app))
            await gate.held()
            during = [await get("/ready").run(app), await get("/health").run(app)]
            gate.open()
            await full
            return [before, *during, await get("/ready").run(app)]

    before, refused, alive, after = asyncio.run(scenario())
    assert (before.status, refused.status, alive.status, after.status) == (200, 503, 200, 200)
    assert int(refused.headers["retry-after"]) >= 1
    assert json.loads(refused.body)["error"]["code"] == "overloaded"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/steering/preview"])
@pytest.mark.parametrize("declared", [True, False])
def test_an_oversized_body_is_a_413_and_is_not_read_on(path: str, declared: bool) -> None:
    chunks = [b" " * 100] * 50

    async def scenario() -> Call:
        async with running(TextEngine(), ServerConfig(max_body_bytes=1000)) as app:
            headers = {"content-length": "5000"} if declared else {}
            return await Call(path, chunks=chunks, headers=headers).run(app)

    call = asyncio.run(scenario())
    assert call.status == 413
    assert json.loads(call.body)["error"]["code"] == "body_too_large"
    assert call.received == (0 if declared else 11)


def test_a_body_at_the_limit_is_read() -> None:
    raw = json.dumps(BODY).encode()
    with serving(TextEngine(), ServerConfig(max_body_bytes=len(raw))) as client:
        assert client.post("/v1/completions", content=raw).status_code == 200
        assert client.post("/v1/completions", content=raw + b" ").status_code == 413


def test_what_nobody_expected_is_a_500_without_internals(
    engine: TextEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(engine, "admit", broken)
    with serving(engine, ServerConfig()) as client, caplog.at_level(logging.ERROR):
        response = client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
    assert response.status_code == 500
    assert "mine-1" in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert "mine-1" in caplog.text
    assert "secret detail" in caplog.text


def test_shutdown_lets_running_requests_finish_and_refuses_new_ones() -> None:
    engine = TextEngine()
    gate = Gate(engine, 5)

    async def scenario() -> tuple[Call, Call]:
        async with running(engine) as app:
            running_call, late = Call("/v1/completions", BODY | {"stream": True}), Call("/v1/completions", BODY)
            task = asyncio.create_task(running_call.run(app))
            await gate.held()
            assert not app.state.worker.drain(0)
            await late.run(app)
            gate.open()
            await task
            return running_call, late

    running_call, late = asyncio.run(scenario())
    assert running_call.body.endswith(b"data: [DONE]\n\n")
    assert (late.status, late.headers["retry-after"]) == (503, "1")
    assert engine.closed


def test_closing_ends_what_still_runs() -> None:
    engine = TextEngine()
    gate = Gate(engine, 5)

    async def scenario() -> list[Event | None]:
        worker = worker_of(engine)
        worker.start()
        subscription = await worker.submit([engine.admit(_params(400)), engine.admit(_params(400))])
        await gate.held()
        worker.stop()
        gate.open()
        await asyncio.to_thread(worker.close)
        events = []
        while subscription.unfinished:
            events.append(await subscription.get(PATIENCE))
        with pytest.raises(EngineDownError, match="shutting down"):
            await worker.submit([])
        return events

    terminal = [event for event in asyncio.run(scenario()) if isinstance(event, Failed)]
    assert [(event.request_id, event.aborted) for event in terminal] == [("row-1", True), ("row-2", True)]


def test_an_idle_worker_does_not_step() -> None:
    engine = TextEngine()

    async def scenario() -> None:
        worker = worker_of(engine)
        worker.start()
        worker.abort(["unknown"])
        assert worker.drain(5)
        with pytest.raises(QueueFullError):
            await worker.submit([])
        worker.close()

    asyncio.run(scenario())
    assert engine.steps == 0


def test_a_worker_that_was_not_started_takes_no_work() -> None:
    async def scenario() -> None:
        worker = worker_of(TextEngine())
        with pytest.raises(EngineDownError, match="not been started"):
            await worker.submit([])
        worker.close()

    asyncio.run(scenario())


def test_a_closed_loop_frees_its_rows() -> None:
    engine = TextEngine()
    gate = Gate(engine, 5)
    worker = worker_of(engine)
    worker.start()

    async def forgetful() -> None:
        await worker.submit([engine.admit(_params(40))])
        await gate.held()

    thread = threading.Thread(target=lambda: asyncio.run(forgetful()))
    thread.start()
    thread.join()
    gate.open()
    assert worker.drain(PATIENCE)
    worker.close()
    assert engine.aborted == ["row-1"]


def _params(max_tokens: int) -> GenerationParams:
    return GenerationParams(prompt="a", max_tokens=max_tokens)
