"""Load of an engine as its worker sees it: rows waiting and running, steps a second."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from steerserve.engine.api.events import Done, Event, Failed
from steerserve.errors import QueueFullError
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.worker.subscription import Subscription

MEMORY = 0.95
"""Weight of what was measured before, in the moving average of the rate."""


@dataclass(eq=False)
class LiveRow:
    """A row between its acceptance and its end."""

    subscription: Subscription
    steps: int
    """Canvas-steps it takes at most."""
    width: int = 1
    """Canvases of each of its steps."""
    started: bool = False
    """True once it has been in a batch, which its first event shows."""


class Load:
    """Kept by the engine's thread alone; its properties may be read from any.

    A canvas-step is one denoising step of one canvas, whatever the batch it runs in: a row with a twin (guided, or with
    its KL measured) takes two at each of its steps.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]], metrics: Metrics) -> None:
        self._read = read
        self._metrics = metrics
        self._now: Mapping[str, Any] = read()
        self._rate = 0.0
        self._waiting_steps = 0
        self.rows: dict[str, LiveRow] = {}

    @property
    def now(self) -> Mapping[str, Any]:
        """Load that the engine stated after its last step, as `Service.load` lists it, and `queue_steps`."""
        return {**self._now, "queue_steps": self._waiting_steps}

    @property
    def waiting_steps(self) -> int:
        """Canvas-steps of the rows that wait for a place in a batch."""
        return self._waiting_steps

    @property
    def waiting_seconds(self) -> float:
        """Seconds of work that waits, at the rate the engine has had lately; 0 where none does."""
        return self.seconds_for(self._waiting_steps) if self._waiting_steps else 0.0

    def seconds_for(self, steps: float) -> float:
        """Seconds that the engine takes for so many canvas-steps, at the rate it has had lately; at least one."""
        return max(1.0, steps / self._rate) if self._rate > 0 else 1.0

    def check_full(self, arriving: int, most: int | None) -> None:
        """Raise QueueFullError where no request would find room: as many rows as may wait do, or are about to, or more
        than `most` canvas-steps would wait with any further one. arriving: rows on their way into the queue.

        Reads the engine itself, from whichever thread calls, since a step may have let rows in since it began.
        """
        now, steps = self._read(), self._waiting_steps
        rows = int(now["queue_length"]) + arriving
        if rows >= now["max_queue"] or (most is not None and steps >= most):
            raise QueueFullError(f"the queue is full: {rows} rows wait for {steps} steps", self.seconds_for(steps / 2))

    def check_room(self, requests: Iterable[Any], most: int | None) -> None:
        """Raise QueueFullError where more than `most` canvas-steps would wait; a queue without any takes whatever
        comes."""
        asked = sum(map(steps_of, requests))
        if most is not None and self._waiting_steps and self._waiting_steps + asked > most:
            raise QueueFullError(
                f"{self._waiting_steps} denoising steps wait, {most} may: no room for {asked} more",
                self.seconds_for(self._waiting_steps + asked - most),
            )

    def added(self, subscription: Subscription, requests: Iterable[Any]) -> None:
        """Note rows that the engine has taken."""
        for request in requests:
            row = LiveRow(subscription, steps_of(request), width_of(request))
            self.rows[request.id] = row
            self._waiting_steps += row.steps
        self._now = self._read()

    def stepped(self, began: float, events: Iterable[Event]) -> None:
        """Note a step that began at `began` (of `time.perf_counter`) and has just ended."""
        seconds = time.perf_counter() - began
        ended, ran = [], 0
        for event in events:
            row = self.rows.get(event.request_id)
            if row is None:
                continue
            aborted = isinstance(event, Failed) and event.aborted
            if not row.started and not aborted:
                self._start(row, began)
            if isinstance(event, Done | Failed):
                ended.append(event.request_id)
                ran += not aborted
        started = [row for row in self.rows.values() if row.started]
        running = {row.subscription.steering for row in started}
        width = sum(row.width for row in started) / max(1, len(started))
        for request_id in ended:
            self.remove(request_id)
        self._now = self._read()
        # Those that ended took part in the step, and the engine does not count them any more.
        batch = int(self._now["running_rows"]) + ran
        if batch:
            rate = batch * max(width, 1.0) / max(seconds, 1e-6)
            self._rate = rate if self._rate == 0.0 else MEMORY * self._rate + (1 - MEMORY) * rate
            self._metrics.observe_step(seconds, batch, int(self._now["max_rows"]), len(running - {None}))

    def remove(self, request_id: str) -> None:
        """Forget a row that has ended."""
        row = self.rows.pop(request_id, None)
        if row is not None and not row.started:
            self._waiting_steps -= row.steps

    def _start(self, row: LiveRow, began: float) -> None:
        row.started = True
        self._waiting_steps -= row.steps
        if row.subscription.started is None:
            row.subscription.started = began
            self._metrics.queue_wait_seconds.observe(max(0.0, began - row.subscription.submitted))


def steps_of(request: Any) -> int:
    """Canvas-steps that an admitted row takes at most, as its plan says: what it may write again is counted too."""
    steps = request.plan.get("steps", 1)
    prompt = int(request.plan.get("prompt_passes", 0))
    return int(request.plan.get("max_steps", steps)) * width_of(request) + prompt


def width_of(request: Any) -> int:
    """Canvases of each step of an admitted row, as its plan says."""
    return int(request.plan.get("rows_per_step", 1))
