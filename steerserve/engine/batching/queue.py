"""The rows that wait, and which of them join the next forward."""

from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import attrgetter

from steerserve.engine.batching.memory import MemoryLimits, MemoryUse, footprint
from steerserve.engine.request.request import Request
from steerserve.models import ModelFacts

AGING = 64
"""Steps of waiting that are worth one level of priority."""
PATIENCE = 32
"""Steps at which others may go past the first row while it does not fit beside those that run."""


class Queue:
    """Rows in the order in which they are due: by arrival, each level of priority being worth AGING steps of it.

    A row that arrived n levels * AGING steps before another goes first whatever their priorities, so none starves. Rows
    that fit may go past the first one while it does not, but at PATIENCE steps at most: then no more join until enough
    of those that run have ended.
    """

    def __init__(self, facts: ModelFacts) -> None:
        self._facts = facts
        self._rows: list[Request] = []
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._rows)

    def add(self, requests: Sequence[Request], step: int) -> None:
        """Queue rows that arrive at a step of the engine, in their order."""
        for request in requests:
            request.due = (step + AGING * request.params.priority, self._arrived)
            self._arrived += 1
            insort(self._rows, request, key=attrgetter("due"))

    def put_back(self, requests: Iterable[Request]) -> None:
        """Queue rows again that had been taken; they are due when they were. What they keep of the batch that they were
        in must have been handed back to them."""
        again = list(requests)
        for request in again:
            for cache in (request.cache, request.bare_cache):
                if cache is not None:
                    cache.set_aside()
        # Only now: no row is queued of which memory runs out for what it keeps.
        for request in again:
            insort(self._rows, request, key=attrgetter("due"))

    def drop(self, ids: Collection[str]) -> None:
        """Forget these rows."""
        self._rows = [request for request in self._rows if request.id not in ids]

    def clear(self) -> None:
        """Forget all rows."""
        self._rows = []

    def give_way(self, running: Sequence[Request], limits: MemoryLimits, grown: Collection[str]) -> list[Request]:
        """Those of the rows that run which go on where some of them, `grown`, may take up more than they did; the grown
        ones that do not fit beside the others are queued again."""
        taken, going = MemoryUse(), set[str]()
        for request in sorted(running, key=lambda request: request.id in grown):
            together = taken + footprint(request, self._facts)
            if request.id not in grown or limits.hold(together) or not taken.rows:
                taken = together
                going.add(request.id)
        self.put_back(request for request in running if request.id not in going)
        return [request for request in running if request.id in going]

    def take(self, running: Sequence[Request], limits: MemoryLimits) -> list[Request]:
        """Remove and return the rows that join those that run. A row that never fits runs alone."""
        taken = sum((footprint(request, self._facts) for request in running), MemoryUse())
        joining: list[Request] = []
        passed: Request | None = None
        for request in self._rows:
            if taken.rows >= limits.rows:
                break
            together = taken + footprint(request, self._facts)
            if limits.hold(together) or not taken.rows:
                joining.append(request)
                taken = together
            elif passed is None:
                passed = request
                if passed.passed_over >= PATIENCE:
                    break
        if passed is not None and joining and joining[-1].due > passed.due:
            passed.passed_over += 1
        chosen = {request.id for request in joining}
        if chosen:
            self.drop(chosen)
        return joining
