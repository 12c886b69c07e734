"""Report of one fault: what came of every request, and what it left behind."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from bench.faults.http import ended_once
from bench.faults.server import IDLE_SECONDS, Served

LEFT, LET_GO = "left", "closed, no head came"
WARM_UPS = {"oversized everything": 7, "malformed and truncated bodies": 1}
HEAD = "\n".join(
    (
        "| fault | requests | outcomes | one end | one log line | left behind | |",
        "|---|---|---|---|---|---|---|",
    )
)


@dataclass
class Report:
    """Outcomes of one fault, and the connections, tasks and files left over after it."""

    fault: str
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    ends: str = "-"
    reported: str = "-"
    left: dict[str, float] | None = None
    note: str = ""


Fault = Callable[[Served, Report], Coroutine[Any, Any, None]]


def run_fault(server: Served, fault: str, act: Fault, reported: int | None = None) -> Report:
    """Do one fault to a server that goes on running, and look at what is left of it.

    reported: requests that must have a line in the log, where these are not all.
    """
    report = Report(fault)
    for _ in range(WARM_UPS.get(fault, 0)):
        asyncio.run(act(server, Report(fault)))
    before = server.settled(server.left())
    first = server.sent + 1
    asyncio.run(act(server, report))
    ids = [f"r{i}" for i in range(first, server.sent + 1)]
    report.requests = report.requests or len(ids)
    after = server.settled(before)
    report.left = {name: round(after[name] - before[name]) for name in before}
    wanted = len(ids) if reported is None else reported
    report.reported = f"{_reported(server, ids, wanted)} of {wanted}"
    stayed = {name: count for name, count in report.outcomes.items() if name not in (LEFT, LET_GO)}
    if stayed:
        report.ends = f"{sum(count for name, count in stayed.items() if ended_once(name))} of {sum(stayed.values())}"
    return report


def _reported(server: Served, ids: list[str], wanted: int) -> int:
    """Number of these requests that have one line in the log, once all have or after a while: a request's line is
    written after its connection has ended."""
    until = time.monotonic() + IDLE_SECONDS
    while True:
        lines = server.lines()
        count = sum(lines[one] == 1 for one in ids)
        if count == wanted or time.monotonic() > until:
            return count
        time.sleep(0.2)


def row(report: dict[str, Any]) -> str:
    """A line of the table."""
    outcomes = ", ".join(f"{name}: {count}" for name, count in report["outcomes"].items())
    left = (
        "-" if report["left"] is None else ", ".join(f"{report['left'][name]:+.0f} {name}" for name in report["left"])
    )
    cells = (report["fault"], report["requests"], outcomes, report["ends"], report["reported"], left, report["note"])
    return "| " + " | ".join(map(str, cells)) + " |"
