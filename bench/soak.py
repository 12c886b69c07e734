"""A server at twice what it can do, for half an hour: what it holds, what it answers, and how long that takes.

    python -m bench.soak [--minutes 30] [--load 2] [--max-rows 8] [--max-queue 16] [--out bench/results/soak.json]

A server with the bundled model is started and its capacity measured in a closed loop, as `bench.serve` does. Then
requests come at random times at LOAD times that, whatever the answers: completions of 16, 32 or 64 tokens in half as
many steps, plain and steered, whole and streamed in each of the three modes; a twentieth of them streams whose
client leaves halfway, a twentieth with an error in them.

What must hold: each request whose client stays gets one terminal answer, and every request has one line in the log;
memory, files and threads do not grow; no accepted request waits longer than a full queue takes at the rate that is
served. Prints a line a minute and ends with JSON.
"""

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.faults.http import ended_once, outcome, posted, served
from bench.faults.report import LEFT
from bench.faults.server import PATIENCE, Served
from bench.load import Target, body, closed
from bench.wire import Client

WARM_SECONDS = 60.0
"""What the capacity is measured in."""
WHOLE = ("200", "200 [DONE]")
"""Outcomes that count as served."""
STAYS = 0.9
"""Share of requests that stay; half of the others leave halfway, half are wrong."""


@dataclass
class Soak:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    """How long each whole answer took, in seconds."""
    held: list[dict[str, float]] = field(default_factory=list)
    """What the server held, once a minute, the first before any load."""
    sent: int = 0


def asked(chance: random.Random, target: Target) -> tuple[dict[str, Any], bool]:
    """A request of the mix, and whether its client leaves halfway."""
    one, kind = body(chance, target), chance.random()
    if kind < STAYS:
        mode = chance.choice((None, "append", "replace", "events"))
        return (one if mode is None else streamed(one, mode)), False
    if kind < (1 + STAYS) / 2:
        return streamed(one, "events"), True
    return one | {"max_tokens": -1}, False


def streamed(one: dict[str, Any], mode: str) -> dict[str, Any]:
    """The request as a stream of this mode."""
    return one | {"stream": True, "diffusion": one["diffusion"] | {"stream_mode": mode}}


async def ask(server: Served, raw: bytes, leaves: bool, soak: Soak) -> None:
    """Send one request, read its answer to the end, or half of it, and note what came of it."""
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw)
        if leaves:
            head = await asyncio.wait_for(reader.readline(), PATIENCE)
            if b" 200 " in head:
                # An incomplete read is a stream that was over before it could be left.
                with contextlib.suppress(asyncio.IncompleteReadError):
                    await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE)
            name = LEFT
        else:
            name = outcome(await asyncio.wait_for(reader.read(), PATIENCE))
        writer.close()
    except (OSError, TimeoutError) as error:
        name = type(error).__name__
    soak.outcomes[name] += 1
    if name in WHOLE:
        soak.took.append(time.monotonic() - began)


async def run(server: Served, target: Target, capacity: float, load: float, seconds: float) -> Soak:
    """Requests at `load` times the capacity, a second, for so long; all are answered at the end."""
    soak, chance = Soak(held=[server.left()]), random.Random(6)
    began, due, minute = time.monotonic(), 0.0, 60.0
    async with asyncio.TaskGroup() as group:
        while due < seconds:
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            one, leaves = asked(chance, target)
            group.create_task(ask(server, posted(server, one), leaves, soak))
            soak.sent += 1
            due += chance.expovariate(load * capacity)
            if due >= minute:
                minute += 60.0
                soak.held.append(server.held())
                print(f"{round(time.monotonic() - began)} s: {soak.held[-1]}, {dict(soak.outcomes)}", flush=True)
    return soak


def summary(soak: Soak, lines: Counter[str], after: dict[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """What is to be shown, in figures."""
    memory = [one["MiB"] for one in [*soak.held, after]][1:]
    # The first third fills pools and caches; a leak goes on after it.
    late = memory[len(memory) // 3 :]
    slope = float(np.polyfit(range(len(late)), late, 1)[0]) * 60 if len(late) > 1 else float("nan")
    stayed = {name: count for name, count in soak.outcomes.items() if name != LEFT}
    served_a_second = len(soak.took) / (arguments.minutes * 60)
    took = np.quantile(soak.took, [0.5, 0.99, 1.0]).round(2).tolist()
    return {
        "minutes": arguments.minutes,
        "load": arguments.load,
        "max_rows": arguments.max_rows,
        "max_queue": arguments.max_queue,
        "requests": soak.sent,
        "outcomes": dict(soak.outcomes),
        "without_one_answer": sum(count for name, count in stayed.items() if not ended_once(name)),
        "requests_in_the_log": len(lines),
        "with_more_than_one_line": sum(count > 1 for count in lines.values()),
        "goodput_a_second": round(served_a_second, 2),
        "seconds": dict(zip(("p50", "p99", "most"), took, strict=True)),
        "full_queue_seconds": round((arguments.max_queue + arguments.max_rows) / served_a_second, 2),
        "MiB": {"first": memory[0], "last": memory[-1], "least": min(memory), "most": max(memory)},
        "MiB_an_hour": round(slope, 1),
        "held": {"before": soak.held[0], "after": after},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=2.0)
    parser.add_argument("--max-rows", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    flags = ["--max-rows", str(arguments.max_rows), "--max-queue", str(arguments.max_queue)]
    flags += ["--threads", str(arguments.threads)] if arguments.threads is not None else []
    with served(*flags) as server:
        attributes = tuple(one["name"] for one in server.get("/v1/attributes")["data"])
        warm = server.sent

        async def act() -> Soak:
            client = Client(f"http://127.0.0.1:{server.port}")
            target = Target(client, "bundled", attributes, arguments.max_rows, arguments.max_queue, None)
            capacity = (await closed(target, WARM_SECONDS, seed=0)).answers_per_second
            client.close()
            await asyncio.to_thread(server.settled, {"files": float("inf")})
            print(f"capacity: {capacity:.2f} answers a second", flush=True)
            return await run(server, target, capacity, arguments.load, arguments.minutes * 60)

        soak = asyncio.run(act())
        after = server.settled(soak.held[0])
        mine = {f"r{number}" for number in range(warm + 1, server.sent + 1)}
        lines = Counter({name: count for name, count in server.lines().items() if name in mine})
    result = summary(soak, lines, after, arguments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
