"""How much a row may have read of itself while it runs."""

from typing import Final

from steerserve.engine.api.params import TraceParams
from steerserve.errors import RequestError

MAX_READINGS: Final = 1 << 20
"""Numbers read by position that a row may keep until its answer: about 32 MB."""


def check_readings(trace: TraceParams | None, positions: int, steps: int) -> None:
    """Raise RequestError for a trace by position, of so many positions and at most so many steps, that is too large."""
    if trace is None or not trace.positions:
        return
    read = len(set(trace.attributes)) + len(set(trace.features))
    count = read * positions * -(-steps // trace.every)
    if count > MAX_READINGS:
        raise RequestError(
            f"a trace of each position is {count} numbers, attributes and features x max_tokens x steps read: at most "
            f"{MAX_READINGS} are kept; take a larger trace.every",
            "trace.positions",
        )
