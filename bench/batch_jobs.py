"""A batch of small requests that is killed and run again: every request must have exactly one line.

    python -m bench.batch_jobs [--requests 10000] [--servers 2] [--kills 2] [--out bench/results/batch_jobs.json]

Starts servers with the bundled model, writes a batch file (half plain, half steered, a seed each), and runs
`steerserve batch` on it. Each run but the last is killed (SIGKILL) once the file has its share of the lines. Then the
lines are counted, each is held against its request by the seed that its answer tells, and the lines that stood before
each kill against those that stand now. The servers' logs say how many requests were answered in all: those above the
number of lines were answered for a run that was killed before it could write.

Writes the JSON and, beside it, a table. The client shares the machine with the servers.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.faults.server import Served, started

BODY = {"model": "bundled", "prompt": "the", "max_tokens": 4, "diffusion": {"steps": 2}}
STEERING = {"interventions": [{"attribute": "topic/sports"}]}


def write_batch(path: Path, count: int) -> None:
    """Requests 0 to `count`, each named by its seed."""
    with path.open("w", encoding="utf-8") as out:
        for seed in range(count):
            body = BODY | {"seed": seed} | ({"steering": STEERING} if seed % 2 else {})
            line = {"custom_id": str(seed), "method": "POST", "url": "/v1/completions", "body": body}
            out.write(json.dumps(line) + "\n")


def one_run(batch: Path, out: Path, servers: list[Served], until: int | None) -> dict[str, Any]:
    """Run the command to its end, or kill it once its file has `until` lines; the lines that stand then."""
    command = [sys.executable, "-m", "steerserve.cli", "batch", str(batch), str(out)]
    for server in servers:
        command += ["--url", f"http://127.0.0.1:{server.port}"]
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(0.05)
        if until is not None and out.exists() and lines_of(out) >= until:
            process.send_signal(signal.SIGKILL)
            break
    said = process.communicate()[1]
    seconds = time.monotonic() - began
    told = {"exit_code": process.returncode, "seconds": round(seconds, 1), "lines": lines_of(out)}
    return told | {"torn_line": not out.read_bytes().endswith(b"\n"), "said": said.strip().splitlines()[-1:]}


def lines_of(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n")


def judged(out: Path, count: int, stood: list[bytes]) -> dict[str, Any]:
    """How the lines do against the requests; stood: the file as it was before each kill, up to its last whole line."""
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    names = [line["custom_id"] for line in lines]
    whole = out.read_bytes()
    return {
        "lines": len(lines),
        "requests_without_a_line": len({str(seed) for seed in range(count)} - set(names)),
        "requests_with_more_than_one_line": len(names) - len(set(names)),
        "not_served": sum(line["error"] is not None or line["response"]["status_code"] != 200 for line in lines),
        "with_another_requests_answer": sum(
            line["response"] is not None and line["response"]["body"].get("seed") != int(line["custom_id"])
            for line in lines
        ),
        "steered_without_a_receipt": sum(
            bool(int(line["custom_id"]) % 2) and not line["response"]["body"]["choices"][0].get("steering")
            for line in lines
            if line["response"] is not None
        ),
        "lines_that_changed_after_a_kill": sum(not whole.startswith(before) for before in stood),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/batch_jobs.json"))
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        batch, out = folder / "in.jsonl", folder / "out.jsonl"
        write_batch(batch, given.requests)
        servers = [stack.enter_context(started("--threads", "1")) for _ in range(given.servers)]
        runs, stood = [], []
        for kill in range(given.kills + 1):
            last = kill == given.kills
            until = None if last else given.requests * (kill + 1) // (given.kills + 1)
            runs.append(one_run(batch, out, servers, until))
            print(json.dumps(runs[-1]), flush=True)
            if not last:
                content = out.read_bytes()
                stood.append(content[: content.rfind(b"\n") + 1])
        for server in servers:
            server.settled({"files": float("inf")})
        shares = [
            sum(report["status"] == 200 and report["route"] == "/v1/completions" for report in server.reports())
            for server in servers
        ]
        result = {
            "requests": given.requests,
            "servers": given.servers,
            "cores": os.cpu_count(),
            "load_average_at_the_end": [round(one, 1) for one in os.getloadavg()],
            "python": platform.python_version(),
            "runs": runs,
            "result": judged(out, given.requests, stood),
            "answered_by_servers": sum(shares),
            "answered_by_each_server": shares,
            "requests_a_second": round(given.requests / sum(run["seconds"] for run in runs), 1),
        }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = [
        f"`python -m bench.batch_jobs`: {result['requests']} requests of 4 tokens in 2 steps, half of them steered, "
        f"over {result['servers']} servers with the bundled model, killed and run again. {result['cores']} cores, "
        f"shared with other work (load average {result['load_average_at_the_end'][1]}): the rate says nothing of a "
        "server.",
        "",
        "| run | ended by | seconds | lines then | last line torn |",
        "|---|---|---|---|---|",
    ]
    for number, run in enumerate(result["runs"], 1):
        by = "SIGKILL" if run["exit_code"] == -signal.SIGKILL else f"exit code {run['exit_code']}"
        torn = "yes" if run["torn_line"] else "no"
        lines.append(f"| {number} | {by} | {run['seconds']} | {run['lines']} | {torn} |")
    lines += ["", "| in the end | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in result["result"].items()]
    lines.append(f"| answered by servers, lines of killed runs included | {result['answered_by_servers']} |")
    lines.append(f"| requests a second, over all runs | {result['requests_a_second']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
