import asyncio

import pytest

from steerserve.config import ServerConfig
from steerserve.server.http.disconnect import unless_gone
from tests.server.asgi import Call, running
from tests.server.gate import Gate
from tests.server.text_engine import TextEngine

LONG = {"model": "text", "prompt": "a", "n": 3, "max_tokens": 400}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("free_steps", [0, 5])
def test_a_client_that_goes_away_frees_its_rows(stream: bool, free_steps: int) -> None:
    engine = TextEngine()
    gate = Gate(engine, free_steps)

    async def scenario() -> Call:
        async with running(engine) as app:
            call = Call("/v1/completions", LONG | {"stream": stream})
            task = asyncio.create_task(call.run(app))
            await gate.held()
            call.gone.set()
            await task
            gate.open()
            other = await Call("/v1/completions", {"model": "text", "max_tokens": 4}).run(app)
            assert other.status == 200
            return call

    call = asyncio.run(scenario())
    assert b"DONE" not in call.body
    assert b"choices" not in call.body or stream
    assert sorted(engine.aborted) == ["row-1", "row-2", "row-3"]
    assert engine.finished == ["row-4"]


def test_a_client_that_is_gone_before_admission_leaves_nothing_behind() -> None:
    engine = TextEngine()

    async def scenario() -> None:
        async with running(engine) as app:
            call = Call("/v1/completions", LONG)
            call.gone.set()
            await call.run(app)

    asyncio.run(scenario())
    assert not engine.finished
    assert not engine.running
    assert not engine.waiting


def test_a_client_that_goes_away_within_its_body_is_let_go() -> None:
    engine = TextEngine()

    async def scenario() -> Call:
        async with running(engine) as app:
            call = Call("/v1/completions", chunks=[])
            call.gone.set()
            return await call.run(app)

    assert asyncio.run(scenario()).status == 0
    assert engine.steps == 0


def test_a_send_that_fails_ends_the_rows() -> None:
    engine = TextEngine()
    gate = Gate(engine, 1)

    class Broken(Call):
        async def send(self, message: object) -> None:
            if self.received and isinstance(message, dict) and message["type"] == "http.response.body":
                raise OSError("broken pipe")
            await super().send(message)

    async def scenario() -> None:
        async with running(engine) as app:
            body = LONG | {"stream": True, "diffusion": {"stream_mode": "events"}}
            await Broken("/v1/completions", body).run(app)
            gate.open()

    asyncio.run(scenario())
    assert len(engine.aborted) == 3


def test_a_silent_stream_sends_comments() -> None:
    engine = TextEngine()
    gate = Gate(engine, 0)

    async def scenario() -> Call:
        async with running(engine, ServerConfig(keep_alive_seconds=0.02)) as app:
            call = Call("/v1/completions", {"model": "text", "max_tokens": 4, "stream": True})
            task = asyncio.create_task(call.run(app))
            while call.body.count(b": keep-alive\n\n") < 2:
                await asyncio.sleep(0.005)
            gate.open()
            await task
            return call

    call = asyncio.run(scenario())
    assert call.body.endswith(b"data: [DONE]\n\n")
    assert call.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in call.headers


@pytest.mark.parametrize("steps", [0, 1])
def test_a_result_that_comes_too_late_is_undone(steps: int) -> None:
    undone: list[str] = []

    async def scenario() -> None:
        loop, never = asyncio.get_running_loop(), asyncio.Event()

        async def receive() -> dict[str, str]:
            await never.wait()
            return {"type": "http.disconnect"}

        def later(left: int) -> None:
            # In the very round in which the result is there, or while it is on its way.
            if left:
                loop.call_soon(later, left - 1)
            else:
                caller.cancel()

        async def work() -> str:
            later(steps + 1)
            return "rows"

        caller = asyncio.create_task(unless_gone(receive, work(), undone.append))
        with pytest.raises(asyncio.CancelledError):
            await caller
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert undone == ["rows"]


def test_a_result_that_is_returned_is_not_undone() -> None:
    async def scenario() -> str:
        async def work() -> str:
            return "rows"

        return await unless_gone(asyncio.Event().wait, work(), lambda _: pytest.fail("undone"))  # type: ignore[arg-type]

    assert asyncio.run(scenario()) == "rows"
