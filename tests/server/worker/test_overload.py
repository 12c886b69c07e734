"""More work than there is room for: what is refused costs next to nothing, and never more than a few are admitted at
once."""

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import pytest

from steerserve.engine.api.params import GenerationParams
from steerserve.errors import QueueFullError
from steerserve.server.worker.pool import AT_ONCE, Turns
from tests.server.asgi import Call, running
from tests.server.gate import Gate
from tests.server.sockets import PATIENCE
from tests.server.text_engine import TextEngine, TextRequest
from tests.server.worker.test_faults import worker_of

BODY: dict[str, Any] = {"model": "text", "max_tokens": 30}


class Counting(TextEngine):
    """Counts what is admitted, and how much of it at once."""

    def __init__(self, **bounds: int) -> None:
        super().__init__(**bounds)
        self.admitted = self.now = self.most = 0
        self.counting = threading.Lock()
        self.pairs: threading.Barrier | None = None
        """Where it is set, nothing is admitted but together with something else."""

    def admit(self, params: GenerationParams) -> TextRequest:
        with self.counting:
            self.admitted += 1
            self.now += 1
            self.most = max(self.most, self.now)
        if self.pairs is not None:
            self.pairs.wait(PATIENCE)
            time.sleep(0.002)
        with self.counting:
            self.now -= 1
        return super().admit(params)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [BODY, BODY | {"stream": True}, {"model": 3}, "no object"])
def test_a_full_queue_refuses_before_it_reads_or_admits_anything(path: str, body: Any) -> None:
    engine = Counting(max_queue=0)

    async def scenario() -> tuple[Call, Call]:
        async with running(engine) as app:
            refused = await Call(path, body).run(app)
            return refused, await Call("/v1/steering/preview", BODY).run(app)

    refused, preview = asyncio.run(scenario())
    assert (refused.status, refused.received) == (503, 0)
    assert int(refused.headers["retry-after"]) >= 1
    assert b"overloaded" in refused.body
    # What waits for no place in the queue is still told.
    assert (preview.status, engine.admitted) == (200, 1)


def test_a_crowd_during_a_step_is_admitted_as_far_as_there_is_room() -> None:
    engine = Counting(max_rows=1, max_queue=4)
    gate = Gate(engine, 2)

    async def scenario() -> Counter[int]:
        async with running(engine) as app:
            first = asyncio.create_task(Call("/v1/completions", BODY).run(app))
            await gate.held()
            crowd = [asyncio.create_task(Call("/v1/completions", BODY).run(app)) for _ in range(60)]
            # Those for whom there is no room are told so while the step lasts, but for those whose turns came together.
            while sum(one.done() for one in crowd) <= len(crowd) - engine.max_queue - AT_ONCE:
                await asyncio.sleep(0.001)
            admitted = engine.admitted
            gate.open()
            answered = await asyncio.gather(first, *crowd)
            assert admitted <= 1 + engine.max_queue + AT_ONCE
            return Counter(call.status for call in answered)

    statuses = asyncio.run(scenario())
    # Those whose turns came last may find the place that the first has left when its step ended.
    assert 1 + engine.max_queue <= statuses[200] <= 1 + engine.max_queue + AT_ONCE
    assert statuses == {200: statuses[200], 503: 61 - statuses[200]}


def test_few_are_admitted_at_once_and_all_in_the_end() -> None:
    engine = Counting(max_rows=64)
    engine.pairs = threading.Barrier(AT_ONCE)

    async def scenario() -> list[Call]:
        async with running(engine) as app:
            return await asyncio.gather(*(Call("/v1/completions", BODY).run(app) for _ in range(40)))

    assert {call.status for call in asyncio.run(scenario())} == {200}
    assert (engine.admitted, engine.most) == (40, AT_ONCE)


def test_a_turn_is_handed_on_whatever_comes_of_it() -> None:
    class FullError(Exception):
        pass

    def fails() -> None:
        raise FullError

    async def scenario() -> list[Any]:
        turns = Turns(at_once=1)
        held = asyncio.create_task(turns.take(time.sleep, 0.05))
        await asyncio.sleep(0)
        gone = asyncio.create_task(turns.take(lambda: 1))
        await asyncio.sleep(0)
        gone.cancel()
        others = [turns.take(lambda: 2, first=fails), turns.take(fails), turns.take(lambda: 3)]
        return await asyncio.gather(held, gone, *others, return_exceptions=True)

    held, gone, *others = asyncio.run(scenario())
    assert held is None and isinstance(gone, asyncio.CancelledError)
    assert [type(one) for one in others] == [FullError, FullError, int]


def test_rows_that_have_come_are_counted_once() -> None:
    engine = TextEngine(max_queue=2)
    gate = Gate(engine, 0)

    async def scenario() -> None:
        worker = worker_of(engine)
        worker.start()
        submitted = asyncio.create_task(worker.submit([engine.admit(GenerationParams(prompt="a", max_tokens=4))]))
        await asyncio.sleep(0)
        # The engine has the row, and this loop has not been told: it does nothing else meanwhile.
        gate.wait_held()
        assert not submitted.done()
        worker.check_room()
        other = asyncio.create_task(worker.submit([engine.admit(GenerationParams(prompt="a", max_tokens=4))]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 rows wait"):
            worker.check_room()
        gate.open()
        await submitted
        await other
        await asyncio.to_thread(worker.close)

    asyncio.run(scenario())


def test_rows_of_a_caller_that_left_are_on_their_way_until_the_engine_has_them() -> None:
    engine = TextEngine(max_queue=1)
    gate = Gate(engine, 0)

    async def scenario() -> None:
        worker = worker_of(engine)
        worker.start()
        first = asyncio.create_task(worker.submit([engine.admit(GenerationParams(prompt="a", max_tokens=4))]))
        await gate.held()
        await first
        gate.let(1)
        await gate.held()
        left = asyncio.create_task(worker.submit([engine.admit(GenerationParams(prompt="a", max_tokens=4))]))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        with pytest.raises(QueueFullError, match="1 rows wait"):
            worker.check_room()
        gate.open()
        await asyncio.to_thread(worker.drain, PATIENCE)
        await asyncio.to_thread(worker.close)
        assert len(engine.aborted) == 1

    asyncio.run(scenario())


def test_a_preview_whose_client_has_left_waits_for_no_turn() -> None:
    opened = threading.Event()

    class Slow(Counting):
        def admit(self, params: GenerationParams) -> TextRequest:
            assert opened.wait(PATIENCE)
            return super().admit(params)

    engine = Slow()

    async def scenario() -> list[Call]:
        async with running(engine) as app:
            calls = [Call("/v1/steering/preview", BODY) for _ in range(AT_ONCE + 1)]
            tasks = [asyncio.create_task(call.run(app)) for call in calls]
            calls[-1].gone.set()
            await tasks[-1]
            opened.set()
            await asyncio.gather(*tasks)
            return calls

    *answered, left = asyncio.run(scenario())
    assert [call.status for call in answered] == [200] * AT_ONCE
    assert (left.status, engine.admitted) == (0, AT_ONCE)
