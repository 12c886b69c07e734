import asyncio
import json
from typing import Any

import pytest

from steerserve.config import ServerConfig
from tests.server.asgi import Call, running
from tests.server.clock import skip
from tests.server.gate import Gate
from tests.server.text_engine import TextEngine
from tests.server.worker.test_faults import get

BODY: dict[str, Any] = {"model": "text", "max_tokens": 30, "n": 2}


@pytest.mark.parametrize("free_steps", [0, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_ends_in_an_answer_and_frees_its_rows(free_steps: int, stream: bool) -> None:
    engine = TextEngine()
    gate = Gate(engine, free_steps)

    async def scenario() -> tuple[Call, str]:
        async with running(engine, ServerConfig(request_timeout=600, drain_seconds=5)) as app:
            call = Call("/v1/completions", BODY | {"stream": stream})
            task = asyncio.create_task(call.run(app))
            await gate.held()
            while stream and not call.status:
                await asyncio.sleep(0)
            skip(asyncio.get_running_loop(), 600)
            await task
            gate.open()
            after = await Call("/v1/completions", {"model": "text", "max_tokens": 4}).run(app)
            assert after.status == 200
            return call, (await get("/metrics").run(app)).body.decode()

    call, metrics = asyncio.run(scenario())
    assert call.complete
    if stream:
        *_, last, end = call.body.split(b"\n\n")
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert (call.status, end) == (200, b"")
        assert b"[DONE]" not in call.body
    else:
        error = json.loads(call.body)["error"]
        assert call.status == 504
        # An openai client would send it again twice.
        assert call.headers["x-should-retry"] == "false"
    assert (error["code"], error["type"]) == ("timeout", "server_error")
    assert sorted(engine.aborted) == ["row-1", "row-2"]
    assert 'steerserve_requests_total{code="504",route="/v1/completions"} 1.0' in metrics


def test_without_a_limit_a_request_may_take_its_time() -> None:
    engine = TextEngine()
    gate = Gate(engine, 1)

    async def scenario() -> Call:
        async with running(engine, ServerConfig(request_timeout=None, drain_seconds=5)) as app:
            task = asyncio.create_task(Call("/v1/completions", BODY).run(app))
            await gate.held()
            gate.open()
            return await task

    assert asyncio.run(scenario()).status == 200


def test_a_client_that_takes_no_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerserve.server.http.deadline.LAST_WORDS", 0.05)
    engine = TextEngine()

    class Stuck(Call):
        stuck = False

        async def send(self, message: Any) -> None:
            if message["type"] == "http.response.body":
                self.stuck = True
                await asyncio.Event().wait()
            await super().send(message)

    async def scenario() -> Call:
        async with running(engine, ServerConfig(request_timeout=600, drain_seconds=5)) as app:
            call = Stuck("/v1/completions", BODY | {"stream": True, "diffusion": {"stream_mode": "events"}})
            task = asyncio.create_task(call.run(app))
            while not call.stuck:
                await asyncio.sleep(0)
            skip(asyncio.get_running_loop(), 600)
            return await task

    call = asyncio.run(scenario())
    assert (call.status, call.complete) == (200, False)
    assert not engine.running
