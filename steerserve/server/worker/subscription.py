"""The events of one request on their way from the engine's thread to the request's loop."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from steerserve.engine.api.events import Done, Event, Failed


class Subscription:
    """The events of one request's rows, in order; used by one task of the loop it was made in."""

    def __init__(self, requests: Sequence[Any], steering: str | None = None) -> None:
        """steering: digest of what the request pushes."""
        self.ids: tuple[str, ...] = tuple(request.id for request in requests)
        self.unfinished = set(self.ids)
        self.loop = asyncio.get_running_loop()
        self.steering = steering
        self.submitted = time.perf_counter()
        self.started: float | None = None
        """When its first row entered a batch; set by the engine's thread."""
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    def put(self, events: Iterable[Event]) -> None:
        """Append events; called in the loop."""
        self._events.extend(events)
        self._arrived.set()

    async def get(self, timeout: float | None = None) -> Event | None:
        """The next event, or None where `timeout` seconds pass without one."""
        if not self._events:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except TimeoutError:
                return None
        event = self._events.popleft()
        if isinstance(event, Done | Failed):
            self.unfinished.discard(event.request_id)
        return event
