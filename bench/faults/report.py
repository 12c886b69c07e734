"""What came of a fault, and what it left behind."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from bench.faults.http import ended_once
from bench.faults.server import IDLE_SECONDS, Served

LEFT, LET_GO = "left", "closed, no head came"
REHEARSED = {"oversized everything": 7, "malformed and truncated bodies": 1}
HEAD = "\n".join(
    (
        "| fault | requests | outcomes | one end | one log line | left behind | |",
        "|---|---|---|---|---|---|---|",
    )
)


@dataclass
class Found:
    """What came of one fault."""

    fault: str
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    ends: str = "-"
    reported: str = "-"
    left: dict[str, float] | None = None
    note: str = ""


Act = Callable[[Served, Found], Coroutine[Any, Any, None]]


def watched(server: Served, fault: str, act: Act, reported: int | None = None) -> Found:
    """Do one fault to a server that goes on running, and look at what is left of it.

    reported: requests that must have a line in the log, where these are not all.
    """
    found = Found(fault)
    for _ in range(REHEARSED.get(fault, 0)):
        asyncio.run(act(server, Found(fault)))
    before = server.settled(server.left())
    first = server.sent + 1
    asyncio.run(act(server, found))
    ids = [f"r{i}" for i in range(first, server.sent + 1)]
    found.requests = found.requests or len(ids)
    after = server.settled(before)
    found.left = {name: round(after[name] - before[name]) for name in before}
    wanted = len(ids) if reported is None else reported
    found.reported = f"{_reported(server, ids, wanted)} of {wanted}"
    stayed = {name: count for name, count in found.outcomes.items() if name not in (LEFT, LET_GO)}
    if stayed:
        found.ends = f"{sum(count for name, count in stayed.items() if ended_once(name))} of {sum(stayed.values())}"
    return found


def _reported(server: Served, ids: list[str], wanted: int) -> int:
    """How many of these requests have one line in the log, once all have or after a while: a request's line is written
    after its connection has ended."""
    until = time.monotonic() + IDLE_SECONDS
    while True:
        lines = server.lines()
        count = sum(lines[one] == 1 for one in ids)
        if count == wanted or time.monotonic() > until:
            return count
        time.sleep(0.2)


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    outcomes = ", ".join(f"{name}: {count}" for name, count in found["outcomes"].items())
    left = "-" if found["left"] is None else ", ".join(f"{found['left'][name]:+.0f} {name}" for name in found["left"])
    cells = (found["fault"], found["requests"], outcomes, found["ends"], found["reported"], left, found["note"])
    return "| " + " | ".join(map(str, cells)) + " |"
