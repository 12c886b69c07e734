"""A running server as its worst users would have it: each fault, what came of every request, and what was left behind.

    python -m bench.faults [--only NAME ...] [--out bench/results/faults.json]

Starts `steerserve serve` with the bundled model, does what each fault says, and prints a table; --out also writes it as
.json and .md (with --only, the other rows stay as they are there). All choices are seeded; times are the machine's.

One end: of the requests whose client stayed, those that got exactly one terminal answer: one whole JSON answer, or a
stream with exactly one `[DONE]` or error event. One log line: of the requests that reached the application, those with
exactly one line in the server's log. Left behind: open files, threads, rows and resident MiB of the server after the
fault and a wait for idleness, less those before. Where a fault needs much memory it is done a few times before, since
freed memory is kept for the next time (a MALLOC_ variable changes that): what grows then would grow for ever.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from bench.faults.bodies import malformed, no_http, oversized
from bench.faults.clients import leaving, never_read, silent, slow_readers
from bench.faults.http import SEED, served
from bench.faults.overload import overload, thousand
from bench.faults.process import full_disk, in_process, stopped
from bench.faults.report import HEAD, Fault, Report, row, run_fault
from bench.faults.server import PATIENCE


def on_one_server(chosen: Callable[[str], bool]) -> Iterator[Report]:
    """The faults that a server must outlive, one after the other on the same one."""
    faults: list[tuple[str, Fault, int | None]] = [
        *((f"client leaves {stage}", leaving(stage, 100), None) for stage in (
            "before the body is complete", "while queued and denoising", "while it streams")),
        ("slow readers", slow_readers, None),
        ("malformed and truncated bodies", malformed, None),
        ("what is no HTTP", no_http, 0),
        ("oversized everything", oversized, None),
        ("1,000 concurrent connections", thousand, None),
        ("4x overload for 30 s", overload, None),
    ]  # fmt: skip
    if any(chosen(name) for name, _, _ in faults):
        with served() as server:
            yield from (run_fault(server, *fault) for fault in faults if chosen(fault[0]))
    short: list[tuple[str, Fault, int | None]] = [
        ("streams that are never read", never_read, None),
        ("heads and bodies that do not come", silent, 50),
    ]
    if any(chosen(name) for name, _, _ in short):
        with served("--request-timeout", "60", "--body-timeout", "3") as server:
            yield from (run_fault(server, *fault) for fault in short if chosen(fault[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the faults to be done")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    def chosen(name: str) -> bool:
        return not arguments.only or any(part in name for part in arguments.only)

    def every() -> Iterator[Report]:
        yield from on_one_server(chosen)
        if chosen("SIGTERM while rows run and stream"):
            yield stopped("SIGTERM while rows run and stream", rows=16)
        if chosen("SIGTERM, and the drain is long enough"):
            yield stopped("SIGTERM, and the drain is long enough", "--drain-seconds", str(PATIENCE), rows=16)
        if chosen("SIGTERM, and rows outlast the drain"):
            yield stopped("SIGTERM, and rows outlast the drain", "--drain-seconds", "1")
        if chosen("SIGKILL and restart"):
            yield stopped("SIGKILL and restart", kill=True)
        if chosen("disk full for logs"):
            yield full_disk()
        yield from (one for one in in_process() if chosen(one.fault))

    began, results = time.monotonic(), {}
    if arguments.only and arguments.out is not None and arguments.out.exists():
        results = {one["fault"]: one for one in json.loads(arguments.out.read_text("utf-8"))["faults"]}
    print(HEAD)
    for report in every():
        results[report.fault] = asdict(report) | {"outcomes": dict(sorted(report.outcomes.items()))}
        print(row(results[report.fault]), flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.out is not None:
        table = "\n".join([HEAD, *map(row, results.values())])
        arguments.out.write_text(json.dumps({"seed": SEED, "faults": list(results.values())}, indent=1) + "\n", "utf-8")
        arguments.out.with_suffix(".md").write_text(table + "\n", "utf-8")


if __name__ == "__main__":
    main()
