"""The servers that a batch is sent to: how much each has, and when it is to be asked again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
SHORTEST_PAUSE: Final = 0.05
"""Seconds between two tries at a server that does not answer: the first, what doubling ends at, and the least that a
server that turns requests away is left alone."""


@dataclass(eq=False)
class Server:
    """One server. Times are of the loop's clock, in seconds.

    How many requests it may have at once goes down to one when it fails and to half when it turns requests away, and up
    by one with each answer (additive increase, multiplicative decrease, as TCP has it).
    """

    url: str
    most: int
    """The most requests it has at once."""
    allowed: int
    running: int = 0
    not_before: float = 0.0
    """When it may be asked next."""
    silent_since: float | None = None
    """Since when it does not answer; None while it does."""
    _failures: int = 0

    def has_room(self, now: float) -> bool:
        """Tell if it may be sent one more."""
        return now >= self.not_before and self.running < self.allowed

    def answered(self) -> None:
        """Note an answer."""
        self.silent_since, self._failures = None, 0
        self.allowed = min(self.most, self.allowed + 1)

    def turned_away(self, now: float, seconds: float) -> None:
        """Note that it takes nothing for so many seconds; said once for all requests that it had then."""
        self.silent_since, self._failures = None, 0
        if now >= self.not_before:
            self.allowed = max(1, self.allowed // 2)
        self.not_before = max(self.not_before, now + max(seconds, SHORTEST_PAUSE))

    def failed(self, now: float) -> bool:
        """Note that it did not answer; whether that is new."""
        if self.silent_since is None:
            self.silent_since = now
        elif now < self.not_before:
            return False
        self.allowed = 1
        self.not_before = now + min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._failures)
        self._failures += 1
        return self._failures == 1


def with_room(servers: Sequence[Server], now: float, last: Server | None) -> Server | None:
    """The server with the fewest running requests of those that have room; another one than `last` where there is."""
    free = [one for one in servers if one.has_room(now)]
    return min(free, key=lambda one: (one is last, one.running), default=None)
