"""Faults inside the server: an exception in each part of the loop, a killed thread, a clock that jumps."""

import asyncio
import ctypes
import gc
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from steerserve.config import ServerConfig
from steerserve.engine.api.events import Committed, Event
from steerserve.engine.api.params import GenerationParams
from steerserve.server.generation.generation import Generation
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.telemetry.record import Visit
from steerserve.server.worker.event_router import Delivery
from steerserve.server.worker.load import LiveRow, Load
from steerserve.server.worker.subscription import Subscription
from tests.server.asgi import Call, running
from tests.server.gate import Gate
from tests.server.sockets import PATIENCE, eventually
from tests.server.text_engine import TextEngine, TextRequest
from tests.server.worker.test_faults import get

BODY: dict[str, Any] = {"model": "text", "max_tokens": 30}


class Broken(TextEngine):
    """Fails in one of its parts the second time that it is used."""

    def __init__(self, part: str) -> None:
        super().__init__(max_rows=2)
        self._part = part
        self._uses = 0

    def add(self, requests: list[TextRequest]) -> None:
        self._fail("add")
        super().add(requests)

    def abort(self, request_id: str) -> None:
        self._fail("abort")
        super().abort(request_id)

    def step(self) -> list[Event]:
        self._fail("step")
        events = super().step()
        if self._part == "events":
            events.append(Committed("nobody", 0, (), ()))
            events.append(3)  # type: ignore[arg-type]
        return events

    def load(self) -> Mapping[str, Any]:
        # Read by callers as well, whose error is their own; the loop is the engine's thread.
        if threading.current_thread().name == "engine":
            self._fail("load")
        return super().load()

    def close(self) -> None:
        self._fail("close", 1)
        super().close()

    def _fail(self, part: str, use: int = 2) -> None:
        if part == self._part:
            self._uses += 1
            if self._uses == use:
                raise RuntimeError("secret detail")


def ended(call: Call) -> str:
    """How a call ended; fails where that was not exactly once."""
    assert call.complete
    assert b"secret" not in call.body
    if call.headers["content-type"].startswith("text/event-stream"):
        frames = [frame.removeprefix(b"data: ") for frame in call.body.split(b"\n\n") if frame.startswith(b"data: ")]
        ends = [frame for frame in frames if frame == b"[DONE]" or b'"error"' in frame]
        assert len(ends) == 1
        assert frames[-1] == ends[0]
        return "done" if ends[0] == b"[DONE]" else str(json.loads(ends[0])["error"]["code"])
    answer = json.loads(call.body)
    return "done" if call.status == 200 else str(answer["error"]["code"])


@pytest.mark.parametrize("part", ["add", "abort", "step", "events", "load", "metrics", "deliver", "close"])
def test_an_exception_anywhere_in_the_loop_answers_everybody(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Broken(part)
    # There is nothing to abort before all have come.
    gate = Gate(engine, 5) if part == "abort" else None
    uses = 0

    def fail_second(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal uses
            uses += 1
            if uses == 2:
                raise RuntimeError("secret detail")
            return real(*arguments)

        return wrapped

    if part == "metrics":
        monkeypatch.setattr(Load, "stepped", fail_second(Load.stepped))
    if part == "deliver":
        monkeypatch.setattr(Delivery, "send", fail_second(Delivery.send))

    async def scenario() -> tuple[list[str], list[int], bool]:
        async with running(engine) as app:
            calls = [Call("/v1/completions", BODY | {"stream": i % 2 == 1, "n": 2}) for i in range(6)]
            leaving = Call("/v1/completions", BODY | {"max_tokens": 400, "n": 2})
            tasks = [asyncio.create_task(call.run(app)) for call in [*calls, leaving]]
            worker = app.state.worker
            if gate is not None:
                await gate.held()
                while len(worker._delivery.live) + 2 * len(worker._delivery.pending) < 2 * len(tasks):
                    await asyncio.sleep(0.001)
            leaving.gone.set()
            if gate is not None:
                await tasks[-1]
                gate.open()
            await asyncio.gather(*tasks)
            if part != "close":
                while worker.intake.down is None:
                    await asyncio.sleep(0.001)
            after = [await call.run(app) for call in (Call("/v1/completions", BODY), get("/health"))]
            return [ended(call) for call in calls], [call.status for call in after], worker.intake.failed

    outcomes, after, failed = asyncio.run(scenario())
    assert set(outcomes) <= {"done", "engine_down", "generation_failed"}
    if part == "close":
        assert outcomes == ["done"] * 6
    else:
        assert failed
        assert after == [503, 503]
    if failed:
        assert engine.closed


# The exception that ends the thread is the point of the test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stage", ["idle", "queued", "running"])
def test_a_killed_engine_thread_answers_everybody(stage: str) -> None:
    engine = TextEngine(max_rows=2)
    gate = Gate(engine, {"idle": 0, "queued": 0, "running": 5}[stage])

    def kill(name: str) -> None:
        [thread] = [one for one in threading.enumerate() if one.name == name and one.is_alive()]
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))

    async def scenario() -> tuple[list[str], int, bool]:
        async with running(engine) as app:
            if stage == "idle":
                # Once it has answered, its thread is where it waits.
                await app.state.worker.ask(lambda _: None)
                kill("engine")
            calls = [Call("/v1/completions", BODY | {"stream": i % 2 == 1}) for i in range(4)]
            tasks = [asyncio.create_task(call.run(app)) for call in calls]
            if stage != "idle":
                await gate.held()
                kill("engine")
            gate.open()
            await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
            health = await get("/health").run(app)
            return [ended(call) for call in calls], health.status, app.state.worker.intake.failed

    outcomes, health, failed = asyncio.run(scenario())
    assert set(outcomes) <= {"engine_down", "generation_failed"}
    assert (health, failed) == (503, True)
    assert engine.closed


def test_a_step_that_does_not_end_makes_the_server_unhealthy() -> None:
    engine = TextEngine()
    gate = Gate(engine, 1)

    async def scenario() -> list[int]:
        async with running(engine, ServerConfig(stall_seconds=0.05, drain_seconds=5)) as app:
            task = asyncio.create_task(Call("/v1/completions", BODY).run(app))
            await gate.held()
            while app.state.worker.step_seconds <= 0.05:
                await asyncio.sleep(0.01)
            hanging = await get("/health").run(app)
            gate.open()
            await task
            return [hanging.status, (await get("/health").run(app)).status]

    assert asyncio.run(scenario()) == [503, 200]


def test_a_clock_that_jumps_changes_no_duration_and_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: draw.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: draw.randrange(4 * 10**18))
    engine = TextEngine()

    async def scenario() -> str:
        async with running(engine) as app:
            for stream in (False, True) * 5:
                assert ended(await Call("/v1/completions", BODY | {"stream": stream}).run(app)) == "done"
            return (await get("/metrics").run(app)).body.decode()

    values = dict(line.rsplit(" ", 1) for line in asyncio.run(scenario()).splitlines() if not line.startswith("#"))
    for name in ("queue_wait_seconds", "time_to_first_token_seconds"):
        assert float(values[f"steerserve_{name}_count"]) == 10
        assert 0 <= float(values[f"steerserve_{name}_sum"]) < 60


def test_too_many_waiting_steps_are_a_503_with_the_time_they_take() -> None:
    engine = TextEngine(max_rows=1)
    gate = Gate(engine, 10)

    async def scenario() -> tuple[list[int], Call, float]:
        async with running(engine, ServerConfig(max_queue_steps=100, drain_seconds=5)) as app:
            # Nothing waits: it is taken however long it is.
            first = asyncio.create_task(Call("/v1/completions", BODY | {"max_tokens": 400}).run(app))
            await gate.held()
            second = asyncio.create_task(Call("/v1/completions", BODY | {"max_tokens": 90}).run(app))
            worker = app.state.worker
            while not worker._delivery.pending:
                await asyncio.sleep(0.001)
            gate.let(1)
            await gate.held()
            assert worker.load.waiting_steps == 90
            refused = asyncio.create_task(Call("/v1/completions", BODY | {"max_tokens": 20}).run(app))
            while not worker._delivery.pending:
                await asyncio.sleep(0.001)
            gate.open()
            await asyncio.gather(first, second, refused)
            return [first.result().status, second.result().status], refused.result(), worker.load.waiting_steps

    served, refused, waiting = asyncio.run(scenario())
    assert served == [200, 200]
    assert refused.status == 503
    assert b"90 denoising steps wait, 100 may" in refused.body
    assert int(refused.headers["retry-after"]) >= 1
    assert waiting == 0


def test_the_rate_that_was_measured_decides_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TextEngine()

    async def scenario() -> list[float]:
        load = Load(engine.load, Metrics())
        before = load.seconds_for(1000)
        request = engine.admit(_params())
        engine.add([request])
        load.added(Subscription([request]), [request])
        # One row in a step of half a second: two canvas-steps a second.
        monkeypatch.setattr(time, "perf_counter", lambda: 1000.5)
        load.stepped(1000.0, engine.step())
        monkeypatch.undo()
        return [before, load.seconds_for(100), load.seconds_for(0.1)]

    before, after, least = asyncio.run(scenario())
    assert (before, least) == (1.0, 1.0)
    assert after == pytest.approx(50)


def test_twins_and_what_may_be_written_again_wait_too() -> None:
    engine = TextEngine(max_rows=1)
    request = engine.admit(_params())
    request.plan.update(steps=10, max_steps=30, rows_per_step=2)

    async def scenario() -> tuple[int, float]:
        load = Load(engine.load, Metrics())
        engine.add([request])
        load.added(Subscription([request]), [request])
        waiting = load.waiting_steps
        # One row of two canvases in a step of half a second: four canvas-steps a second.
        load.stepped(time.perf_counter() - 0.5, engine.step())
        return waiting, load.seconds_for(100)

    waiting, seconds = asyncio.run(scenario())
    assert waiting == 60
    assert seconds == pytest.approx(25, rel=0.2)


def _params() -> Any:
    return GenerationParams(prompt="a", max_tokens=30)


def test_requests_that_have_ended_leave_no_object_behind() -> None:
    def there() -> list[object]:
        gc.collect()
        return [one for one in gc.get_objects() if type(one) in (Visit, Generation, Subscription, LiveRow)]

    # Of other tests; held, so that nothing new takes their place.
    before = there()

    async def scenario() -> list[str]:
        async with running(TextEngine()) as app:
            for i in range(30):
                call = Call("/v1/completions", BODY | {"stream": i % 2 == 1, "n": 2})
                if i % 5 == 0:
                    call.gone.set()
                await call.run(app)
                await Call("/v1/completions", BODY | {"n": 0}).run(app)
            await app.state.worker.ask(lambda _: None)
            known = set(map(id, before))
            return [type(one).__name__ for one in there() if id(one) not in known]

    # Of sixty requests: what the threads did last holds its visit until they do something else.
    assert len(asyncio.run(scenario())) <= 10


def test_an_engine_that_hangs_does_not_keep_the_server_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerserve.server.worker.worker.LAST_STEP_SECONDS", 0.05)
    engine = TextEngine()
    gate = Gate(engine, 5)

    async def scenario() -> tuple[list[Call], bool]:
        async with running(engine, ServerConfig(drain_seconds=0.05)) as app:
            calls = [Call("/v1/completions", BODY | {"stream": stream}) for stream in (False, True)]
            tasks = [asyncio.create_task(call.run(app)) for call in calls]
            await gate.held()
        await asyncio.gather(*tasks)
        return calls, app.state.worker.intake.failed

    calls, failed = asyncio.run(scenario())
    assert failed
    assert {ended(call) for call in calls} <= {"generation_failed", "engine_down", "shutting_down"}
    gate.open()
    eventually(lambda: engine.closed)
