"""Threads for the callers' own work, few enough that the engine's thread is not kept waiting for its turn."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from starlette.concurrency import run_in_threadpool

AT_ONCE: Final = 2
"""Pieces of work at once. They share one interpreter lock with the engine's thread, so more of them would finish no
sooner, and each takes a share of the engine's time; with one, a long prompt would hold all others up."""


class WorkerPool:
    """Gives work to threads, in order of arrival, `at_once` at a time; used in one loop."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._free = asyncio.Semaphore(at_once)

    async def take(self, work: Callable[..., Any], *arguments: Any, first: Callable[[], None] | None = None) -> Any:
        """Return what `work` returns, or raise what it raises, in a thread; `first` is called in the loop once the turn
        has come, and where it raises, there is no work to be done."""
        async with self._free:
            if first is not None:
                first()
            return await run_in_threadpool(work, *arguments)
