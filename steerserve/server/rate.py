"""How often and how many at once: the limits of each key, counted."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from steerserve.server.errors import RateLimitError
from steerserve.server.keys import Key

WINDOW = 60.0
"""Seconds over which requests are counted."""


@dataclass(eq=False)
class Usage:
    """What one key has done lately and does now."""

    starts: deque[float] = field(default_factory=deque)
    """When the requests of the last minute began."""
    running: dict[object, float] = field(default_factory=dict)
    """When each request began that has not ended."""
    mean: float = 0.0
    """Moving average of how long its requests take, in seconds."""


class Rates:
    """Counts by the name of a key, so that a key keeps its counts when the file of keys is read again.

    No 60 seconds hold more than `rate_per_minute` requests of a key. What is refused is not counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}

    @contextmanager
    def counted(self, key: Key) -> Iterator[None]:
        """Count one request while it lasts; raises RateLimitError with the seconds after which there will be room."""
        usage = self._usage.setdefault(key.name, Usage())
        now = self._clock()
        self._check(key, usage, now)
        ticket = object()
        usage.running[ticket] = now
        if key.rate_per_minute is not None:
            usage.starts.append(now)
        try:
            yield
        finally:
            took = self._clock() - usage.running.pop(ticket)
            usage.mean = took if usage.mean == 0.0 else 0.9 * usage.mean + 0.1 * took

    def _check(self, key: Key, usage: Usage, now: float) -> None:
        if key.max_concurrent is not None and len(usage.running) >= key.max_concurrent:
            # One ends when the oldest has lasted as long as they do; one that has lasted longer tells nothing more.
            oldest = now - min(usage.running.values())
            raise RateLimitError(
                f"this key may have {key.max_concurrent} requests running at once",
                "concurrency_limit_exceeded",
                max(usage.mean - oldest, usage.mean / key.max_concurrent, 1.0),
            )
        while usage.starts and now - usage.starts[0] >= WINDOW:
            usage.starts.popleft()
        if key.rate_per_minute is not None and len(usage.starts) >= key.rate_per_minute:
            # After a reload that lowered the rate, more than one may have to leave the window.
            leaving = usage.starts[len(usage.starts) - key.rate_per_minute]
            raise RateLimitError(
                f"this key may make {key.rate_per_minute} requests a minute",
                "rate_limit_exceeded",
                max(leaving + WINDOW - now, 0.001),
            )
