"""One request while it runs: its events, what they are worth to the metrics, and its end."""

import time
from collections.abc import AsyncIterator
from typing import Any

from steerserve.engine.events import Committed, Done, Event, Failed
from steerserve.errors import QueueFullError
from steerserve.server.errors import RowFailedError
from steerserve.server.metrics import Metrics
from steerserve.server.render import Answer
from steerserve.server.subscription import Subscription
from steerserve.server.worker import EngineWorker


class Generation:
    """The rows of one request in the engine; `end` must be called whatever happens."""

    def __init__(
        self, answer: Answer, subscription: Subscription, worker: EngineWorker, metrics: Metrics, began: float
    ) -> None:
        self.answer = answer
        self._subscription = subscription
        self._worker = worker
        self._metrics = metrics
        self._began = began

    async def events(self, silence: float | None = None) -> AsyncIterator[Event | None]:
        """The log up to the last row's Done; None after each `silence` seconds without an event.

        `answer` has taken a result before its Done is seen here. Raises RowFailedError where a row failed, and
        QueueFullError where the server shut it down.
        """
        waiting_for_token = True
        while self._subscription.unfinished:
            event = await self._subscription.get(silence)
            if isinstance(event, Failed):
                if event.aborted:
                    raise QueueFullError(event.message, retry_after=1.0)
                raise RowFailedError(event.message)
            if isinstance(event, Committed) and waiting_for_token:
                waiting_for_token = False
                self._metrics.first_token_seconds.observe(time.perf_counter() - self._began)
            if isinstance(event, Done):
                self.answer.results[event.request_id] = event.result
                self._metrics.count_result(event.result)
            yield event

    async def body(self) -> dict[str, Any]:
        """Wait for every row, then the whole answer."""
        async for _ in self.events():
            pass
        return self.answer.body()

    def end(self) -> None:
        """Free the rows that still run, if any."""
        if self._subscription.unfinished:
            self._worker.abort(self._subscription.unfinished)
