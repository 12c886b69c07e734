"""A running server under load: its capacity, then what it still answers as load rises past that.

    python -m bench.serve [--url URL] [--seconds 60] [--rounds 3] [--loads 1 2 4] [--out bench/results/serve.json]

Without --url a server with the bundled model is started, with --max-rows, --max-queue and --threads, and stopped.
Requests are completions of 16, 32 or 64 tokens in half as many steps; half of them are steered by an attribute, drawn
by a seeded generator.

A round measures the capacity, with twice as many clients as fit into a batch, each asking again once it is answered,
and then every load: requests at random times at that multiple of this round's capacity, whatever the answers; one that
is refused does not come back. Nothing is counted until two batches have been answered. Goodput is whole answers a
second; since lengths are drawn, tokens a second, of whole answers, is the steadier figure, and the one that is held
against the capacity. Also: refusals with their least Retry-After, and the processor time that the engine's thread and
all other threads of the server take, which other work on the machine does not change.

The client shares the machine with the server. Prints a table and ends with JSON.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from bench.load import Figures, Target, closed, open_loop
from bench.usage import Usage
from bench.wire import Client


@contextmanager
def served(arguments: argparse.Namespace) -> Iterator[tuple[str, Usage | None]]:
    """The URL given, or that of a server started for the occasion and its processor time."""
    if arguments.url is not None:
        yield arguments.url, None
        return
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--port", "0", "--no-log-requests"]
    command += ["--max-rows", str(arguments.max_rows), "--max-queue", str(arguments.max_queue)]
    command += ["--threads", str(arguments.threads)] if arguments.threads is not None else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stderr=said)
        try:
            while (found := re.search(r"ready at (\S+)", read(said))) is None:
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start:\n{read(said)}")
                time.sleep(0.2)
            yield found[1], Usage(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def read(file: TextIO) -> str:
    """All that a file holds by now."""
    file.seek(0)
    return file.read()


async def idle(client: Client) -> dict[str, Any]:
    """What the server says of itself once nothing runs: what the last load left is let go first."""
    while True:
        ready: dict[str, Any] = (await client.get("/ready")).json
        if ready.get("running_rows") == 0 and ready.get("queue_length") == 0:
            return ready
        await asyncio.sleep(0.1)


async def run(url: str, usage: Usage | None, arguments: argparse.Namespace) -> list[dict[str, Figures]]:
    """The rounds: the figures of the closed loop and of every load."""
    client, rounds = Client(url), []
    ready = await idle(client)
    model = (await client.get("/v1/models")).json["data"][0]["id"]
    attributes = tuple(one["name"] for one in (await client.get("/v1/attributes")).json["data"])
    target = Target(client, model, attributes, ready["max_rows"], ready["max_queue"], usage)
    await closed(target, 1.0, seed=0)
    for seed in range(arguments.rounds):
        await idle(client)
        figures = {"closed": await closed(target, arguments.seconds, seed)}
        print_load("closed", figures["closed"], figures["closed"])
        capacity = figures["closed"].answers_per_second
        for load in arguments.loads:
            await idle(client)
            found = await open_loop(target, load * capacity, load > 1, arguments.seconds, seed)
            figures[f"{load:g}"] = found
            print_load(f"{load:g}", found, figures["closed"])
        rounds.append(figures)
    client.close()
    return rounds


def print_load(load: str, one: Figures, capacity: Figures) -> None:
    """Print a line of the table."""
    share, took = one.cpu_share, one.latency_seconds
    of_capacity = one.tokens_per_second / capacity.tokens_per_second
    cpu = "-" if share is None else f"{share['engine']:.2f} + {share['others']:.2f}"
    print(
        f"| {load} | {one.sent_per_second:.1f} | {one.answers_per_second:.2f} | {one.tokens_per_second:.0f} | "
        f"{of_capacity:.2f} | {took['p50']:.2f} s | {took['p99']:.2f} s | {cpu} | {one.outcomes} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--max-rows", type=int, default=8, help="of a batch; small, so that a minute is many batches")
    parser.add_argument("--max-queue", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print("| load | answers of any kind a second | goodput | tokens a second | against capacity | p50 | p99 | "
          "CPU: engine + others | outcomes |\n" + "|---" * 9 + "|")  # fmt: skip
    with served(arguments) as (url, usage):
        rounds = asyncio.run(run(url, usage, arguments))
    held = {
        load: [one[load].tokens_per_second / one["closed"].tokens_per_second for one in rounds]
        for load in rounds[0]
        if load != "closed"
    }
    for load, ratios in held.items():
        print(f"{load} x capacity: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    result = {
        "seconds": arguments.seconds,
        "max_rows": arguments.max_rows,
        "max_queue": arguments.max_queue,
        "threads": arguments.threads,
        "against_capacity": held,
        "rounds": [{load: asdict(one) for load, one in figures.items()} for figures in rounds],
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
