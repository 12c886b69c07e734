"""A minute of requests, as a moving window of the library `limits`."""

import time
from typing import Final

from limits.aio.storage import MovingWindowSupport

WINDOW: Final = 60
"""Seconds over which requests are counted."""
LEAST_WAIT: Final = 0.001
"""Seconds that are added to a wait: a request that began exactly one window ago still counts."""


async def wait_for_place(window: MovingWindowSupport, name: str, rate: int) -> float | None:
    """Take one of `rate` places in the window; None, or the seconds until the oldest request leaves it.

    The places are counted apart from the rate, so that a lower one counts what was. Where it was lowered within the
    last minute, more than the oldest may have to leave.
    """
    if await window.acquire_entry(name, rate, WINDOW):
        return None
    oldest, _ = await window.get_moving_window(name, rate, WINDOW)
    return max(oldest + WINDOW - time.time(), 0.0) + LEAST_WAIT
