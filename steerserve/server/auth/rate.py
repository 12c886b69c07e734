"""How often and how many at once: the limits of each key, counted."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from steerserve.server.auth.keys import Key
from steerserve.server.errors import RateLimitError

WINDOW = 60.0
"""Seconds over which requests are counted."""


@dataclass(eq=False)
class Running:
    """Requests of one key and one kind that run."""

    begun: dict[object, float] = field(default_factory=dict)
    """When each began that has not ended."""
    mean: float = 0.0
    """Moving average of how long one takes, in seconds."""


@dataclass(eq=False)
class Usage:
    """What one key has done lately and does now."""

    starts: deque[float] = field(default_factory=deque)
    """When the requests of the last minute began, of both kinds."""
    work: Running = field(default_factory=Running)
    changes: Running = field(default_factory=Running)
    """Changes of what runs. Held by the limit of the work, they could not be made when it is used up, which is when
    they are wanted; with none, a key without a rate could have any number of bodies read at once."""


class Rates:
    """Counts by the name of a key, so that a key keeps its counts when the file of keys is read again.

    No 60 seconds hold more than `rate_per_minute` requests of a key; at no time do more than `max_concurrent` of its
    requests for work run, nor more than as many changes of generations. What is refused is not counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}

    @contextmanager
    def counted(self, key: Key, changes: bool = False) -> Iterator[None]:
        """Count one request while it lasts, one that changes a generation or one for work; raises RateLimitError with
        the seconds after which there will be room."""
        usage = self._usage.setdefault(key.name, Usage())
        running = usage.changes if changes else usage.work
        now = self._clock()
        _check_running(key, running, now, "changes of generations" if changes else "requests")
        _check_rate(key, usage, now)
        ticket = object()
        running.begun[ticket] = now
        if key.rate_per_minute is not None:
            usage.starts.append(now)
        try:
            yield
        finally:
            took = self._clock() - running.begun.pop(ticket)
            running.mean = took if running.mean == 0.0 else 0.9 * running.mean + 0.1 * took


def _check_running(key: Key, running: Running, now: float, what: str) -> None:
    if key.max_concurrent is not None and len(running.begun) >= key.max_concurrent:
        # One ends when the oldest has lasted as long as they do; one that has lasted longer tells nothing more.
        oldest = now - min(running.begun.values())
        raise RateLimitError(
            f"this key may have {key.max_concurrent} {what} running at once",
            "concurrency_limit_exceeded",
            max(running.mean - oldest, running.mean / key.max_concurrent, 1.0),
        )


def _check_rate(key: Key, usage: Usage, now: float) -> None:
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
