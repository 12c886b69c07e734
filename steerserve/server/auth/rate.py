"""How often and how many at once: the limits of each key, counted."""

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from limits.aio.storage import MemoryStorage

from steerserve.server.auth.keys import Key
from steerserve.server.auth.limits_store import LimitsStore
from steerserve.server.auth.window import wait_for_place
from steerserve.server.errors import LimitsStoreError, RateLimitError

Release = Callable[[], Awaitable[None]]
"""Ends the count of a request that runs; a second call does nothing."""


@dataclass(eq=False)
class Running:
    """Requests of one key and one kind that run."""

    begun: dict[str, float] = field(default_factory=dict)
    """When each began that has not ended."""
    mean: float = 0.0
    """Moving average of how long one takes, in seconds."""

    def end(self, ticket: str, now: float) -> None:
        """Note the end of one."""
        took = now - self.begun.pop(ticket)
        self.mean = took if self.mean == 0.0 else 0.9 * self.mean + 0.1 * took


@dataclass(eq=False)
class Usage:
    """What one key does now."""

    work: Running = field(default_factory=Running)
    changes: Running = field(default_factory=Running)
    """Changes of what runs. Held by the limit of the work, they could not be made when it is used up, which is when
    they are wanted; with none, a key without a rate could have any number of bodies read at once."""


class Rates:
    """Counts by the name of a key, so that a key keeps its counts when the file of keys is read again.

    No 60 seconds hold more than `rate_per_minute` requests of a key; at no time do more than `max_concurrent` of its
    requests for work run, nor more than as many changes of generations. What is refused is not counted.

    With a store both limits are those of all servers that share it. This server counts its own requests too: while
    the store is away, its own counts hold, or requests of limited keys are refused (`closed`).
    """

    def __init__(
        self, store: LimitsStore | None = None, closed: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._closed = closed
        self._clock = clock
        self._usage: dict[str, Usage] = {}
        self._window = MemoryStorage()

    @asynccontextmanager
    async def counted(self, key: Key, changes: bool = False) -> AsyncIterator[Release]:
        """Count one request while it lasts, one that changes a generation or one for work.

        Gives what ends the count before the end of the block. Raises RateLimitError with the seconds after which there
        will be room, and LimitsStoreError where the store is away and `closed`.
        """
        usage = self._usage.setdefault(key.name, Usage())
        running, kind = (usage.changes, "changes") if changes else (usage.work, "work")
        ticket = uuid.uuid4().hex
        if key.max_concurrent is not None and len(running.begun) >= key.max_concurrent:
            raise self._too_many(key.max_concurrent, running, kind)
        running.begun[ticket] = self._clock()
        lease = f"{kind}/{key.name}"
        try:
            await self._take(key, running, kind, lease, ticket)
        except BaseException:
            del running.begun[ticket]
            await self._return(key, lease, ticket)
            raise

        async def release() -> None:
            if ticket in running.begun:
                running.end(ticket, self._clock())
                await self._return(key, lease, ticket)

        try:
            yield release
        finally:
            await release()

    async def _take(self, key: Key, running: Running, kind: str, lease: str, ticket: str) -> None:
        """Count a request in the store and here; raises RateLimitError, and LimitsStoreError where `closed`."""
        name, rate, most = f"rate/{key.name}", key.rate_per_minute, key.max_concurrent
        shared = False
        if self._store is not None:
            try:
                if most is not None and not await self._store.lease(lease, ticket, most):
                    raise self._too_many(most, running, kind)
                if rate is not None and (wait := await self._store.wait_for_place(name, rate)) is not None:
                    raise _too_often(rate, wait)
                shared = True
            except LimitsStoreError:
                if self._closed:
                    raise
        if rate is not None and (wait := await wait_for_place(self._window, name, rate)) is not None and not shared:
            raise _too_often(rate, wait)

    async def _return(self, key: Key, lease: str, ticket: str) -> None:
        if self._store is not None and key.max_concurrent is not None:
            await self._store.release(lease, ticket)

    def _too_many(self, most: int, running: Running, kind: str) -> RateLimitError:
        # One ends when the oldest has lasted as long as they do; one that has lasted longer tells nothing more.
        oldest = self._clock() - min(running.begun.values())
        what = "changes of generations" if kind == "changes" else "requests"
        return RateLimitError(
            f"this key may have {most} {what} running at once",
            "concurrency_limit_exceeded",
            max(running.mean - oldest, running.mean / most, 1.0),
        )


def _too_often(rate: int, wait: float) -> RateLimitError:
    return RateLimitError(f"this key may make {rate} requests a minute", "rate_limit_exceeded", wait)
