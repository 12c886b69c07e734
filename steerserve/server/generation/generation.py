"""One request while it runs: its events, what they are worth to the metrics, and its end."""

import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from steerserve.engine.api.events import Committed, Done, Event, Failed
from steerserve.server.answers.answer import Answer
from steerserve.server.errors import DeletedError, OverLimitError, RowFailedError, ShuttingDownError, UnsteeredError
from steerserve.server.protocol.encoding import encoded
from steerserve.server.rows.rows import Row
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.telemetry.record import CURRENT_RECORD
from steerserve.server.worker.pool import WorkerPool
from steerserve.server.worker.subscription import Subscription
from steerserve.server.worker.worker import EngineWorker

Value = TypeVar("Value")


class Generation:
    """The rows of one request in the engine; `end` must be called whatever happens."""

    def __init__(
        self,
        answer: Answer,
        subscription: Subscription,
        worker: EngineWorker,
        metrics: Metrics,
        began: float,
        on_end: Callable[[str], None],
        turns: WorkerPool,
    ) -> None:
        """on_end is told the answer's id."""
        self.answer = answer
        self.deleted = False
        """True once its caller has ended it."""
        self._on_end = on_end
        self._turns = turns
        self._subscription = subscription
        self._worker = worker
        self._metrics = metrics
        self._began = began
        self._visit = CURRENT_RECORD.get()
        self._visit.answer_id, self._visit.model = answer.id, answer.model
        self._visit.submitted = subscription.submitted
        metrics.count_attributes(self._visit.attributes)
        if self._visit.steering is not None:
            metrics.steered_requests.inc()

    @property
    def key(self) -> str | None:
        """Name of the key it was begun with."""
        return self._visit.key

    @property
    def steerable(self) -> dict[str, Row]:
        """The rows that still run and are no baselines, by the engine's id."""
        rows = self.answer.rows
        return {name: rows[name] for name in rows if name in self._subscription.unfinished and not rows[name].baseline}

    def delete(self) -> None:
        """End it before its next step; whoever waits for it is told."""
        self.deleted = True
        self._worker.abort(tuple(self._subscription.unfinished))

    async def events(self, silence: float | None = None) -> AsyncIterator[Event | None]:
        """The log up to the last row's Done; None after each `silence` seconds without an event.

        `answer` has taken a result before its Done is seen here. Raises RowFailedError where a row failed, and
        UnsteeredError where that was because steering does not take; OverLimitError where it went over a limit that the
        request itself sets to refuse, ShuttingDownError where the server shut it down, and DeletedError where its
        caller did.
        """
        waiting_for_token = True
        while self._subscription.unfinished:
            event = await self._subscription.get(silence)
            if isinstance(event, Failed):
                if self.deleted:
                    raise DeletedError("the generation was deleted")
                if event.aborted:
                    raise ShuttingDownError(event.message, self._worker.intake.restart_seconds)
                if event.limit is not None:
                    raise OverLimitError(event.message, f"steering.{event.limit}")
                if event.unsteered:
                    self._metrics.steering_failures.inc()
                    raise UnsteeredError(event.message)
                raise RowFailedError(event.message)
            if isinstance(event, Committed) and waiting_for_token:
                waiting_for_token = False
                self._visit.first_token = time.perf_counter()
                self._metrics.time_to_first_token_seconds.observe(self._visit.first_token - self._began)
            if isinstance(event, Done):
                self.answer.results[event.request_id] = event.result
                self._metrics.count_result(event.result)
                self._visit.finished(event.result)
            yield event

    async def body(self) -> bytes:
        """Wait for every row, then the whole answer as JSON."""
        async for _ in self.events():
            pass
        return await self.rendered(lambda: encoded(self.answer.body()))

    async def rendered(self, work: Callable[[], Value]) -> Value:
        """Return what `work` makes of the answer; a long one is made outside the loop, which has others to attend
        to."""
        if not self.answer.long:
            return work()
        rendered: Value = await self._turns.take(work)
        return rendered

    def end(self) -> None:
        """Free the rows that still run, if any."""
        self._on_end(self.answer.id)
        self._visit.started = self._subscription.started
        if self._subscription.unfinished:
            self._worker.abort(self._subscription.unfinished)
