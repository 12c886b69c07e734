"""Faults of the process itself: signals, a full disk, and those that only a test inside it can inject."""

import asyncio
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator

from bench.faults.http import EVENTS, LONG, SMALL, answered, ended_once, everybody, posted, served
from bench.faults.report import Report, run_fault
from bench.faults.server import PATIENCE, Served, started

LOOP = "tests/server/worker/test_faults_loop.py::test_"
IN_PROCESS = (
    ("engine thread killed", LOOP + "a_killed_engine_thread_answers_everybody"),
    ("exception in each step of the loop", LOOP + "an_exception_anywhere_in_the_loop_answers_everybody"),
    ("clock jumps", LOOP + "a_clock_that_jumps_changes_no_duration_and_no_limit"),
)
"""Faults that only the process itself can have: tests that inject them."""


def stopped(fault: str, *flags: str, kill: bool = False, rows: int = 40) -> Report:
    """A signal while rows stream, wait and run; after a kill, another server on the same port."""
    report = Report(fault)
    with served(*flags) as server:

        async def act() -> Counter[str]:
            raws = [posted(server, LONG | {"seed": i} | (EVENTS if i % 2 else {})) for i in range(rows)]
            tasks = [asyncio.create_task(answered(server, raw)) for raw in raws]
            while (await asyncio.to_thread(server.get, "/ready"))["running_rows"] < min(rows, 32):
                await asyncio.sleep(0.05)
            server.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            await asyncio.sleep(0.3)
            late = await everybody(server, [posted(server, SMALL)] * 10)
            report.outcomes = Counter({f"late: {name}": count for name, count in late.items()})
            return Counter(await asyncio.gather(*tasks))

        running = asyncio.run(act())
        code = server.process.wait(PATIENCE)
        report.requests, report.outcomes = rows + 10, report.outcomes + running
        report.note = f"exit code {code}"
        report.ends = f"{sum(count for name, count in running.items() if ended_once(name))} of {sum(running.values())}"
        port, began = server.port, time.monotonic()
    if kill:
        with started(port=port) as again:
            report.note += f"; on the same port again after {time.monotonic() - began:.0f} s: "
            report.note += asyncio.run(answered(again, posted(again, SMALL)))
    return report


def full_disk() -> Report:
    """Standard output and error at /dev/full from the start."""
    fault = "disk full for logs"
    try:
        with served("--log-prompts", full=True) as server:

            async def act(server: Served, report: Report) -> None:
                report.outcomes = await everybody(server, [posted(server, SMALL | {"seed": i}) for i in range(50)])
                raws = [posted(server, b"{") for _ in range(50)]
                report.outcomes += await everybody(server, raws)

            report = run_fault(server, fault, act)
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
                [dropped] = re.findall(rb"(?m)^steerserve_log_lines_dropped_total (\S+)", answer.read())
            server.process.terminate()
            code = server.process.wait(PATIENCE)
        report.reported = "-"
        report.note = f"{float(dropped):.0f} lines counted as dropped; exit code {code} at SIGTERM"
    except RuntimeError as error:
        return Report(fault, note=str(error))
    return report


def in_process() -> Iterator[Report]:
    """The faults that tests inject, run."""
    for fault, test in IN_PROCESS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        outcomes = Counter({name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|error)", told.stdout)})
        yield Report(fault, sum(outcomes.values()), outcomes, note=f"in process: {test}")
