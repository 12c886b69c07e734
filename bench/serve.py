"""A running server under load: capacity in a closed loop, then goodput and latency as open-loop load rises past it.

    python bench/serve.py [--url URL] [--seconds 60] [--loads 0.5 1 2 4] [--out bench/results/serve.json]

Without --url a server with the bundled model is started and stopped. Requests are completions of 16, 32 or 64 tokens
in half as many steps; half of them are steered by an attribute, drawn by a seeded generator. Capacity: completed
requests a second with --concurrency of them always under way. Each load then sends requests at Poisson times at that
multiple of capacity, whatever the answers; what ends after the sending stops is not counted. Goodput counts whole
answers a second after a warm-up of a fifth of the time; refusals (429, 503) are counted with their least Retry-After.
The client shares the machine with the server. Prints a table and ends with JSON.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx2

WARM = 0.2


@dataclass
class Tally:
    """What came of the requests of one load."""

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    done: list[tuple[float, float]] = field(default_factory=list)
    """When each whole answer came, and how long it took, in seconds."""
    retry_after: list[float] = field(default_factory=list)


@contextmanager
def served(url: str | None) -> Iterator[str]:
    """The url given, or that of a server started for the occasion."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "steerserve.cli", "serve", "--port", "0", "--no-log-requests"]
        process = subprocess.Popen(command, stderr=said)
        try:
            while (found := re.search(r"ready at (\S+)", read(said))) is None:
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start:\n{read(said)}")
                time.sleep(0.2)
            yield found[1]
        finally:
            process.terminate()
            process.wait(60)


def read(file: TextIO) -> str:
    """All that a file holds by now."""
    file.seek(0)
    return file.read()


def body(chance: random.Random, model: str, attributes: list[str]) -> dict[str, Any]:
    """One request of the mix."""
    tokens = chance.choice((16, 32, 64))
    asked: dict[str, Any] = {
        "model": model,
        "prompt": "the",
        "max_tokens": tokens,
        "seed": chance.randrange(2**31),
        "diffusion": {"steps": tokens // 2, "ignore_eos": True},
    }
    if attributes and chance.random() < 0.5:
        asked["steering"] = {"interventions": [{"attribute": chance.choice(attributes)}]}
    return asked


async def ask(client: httpx2.AsyncClient, asked: dict[str, Any], tally: Tally) -> None:
    """Send one request and note what came of it."""
    tally.sent += 1
    began = time.monotonic()
    try:
        answer = await client.post("/v1/completions", json=asked)
    except httpx2.HTTPError as error:
        tally.outcomes[type(error).__name__] += 1
        return
    tally.outcomes[str(answer.status_code)] += 1
    if answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] in ("stop", "length"):
        now = time.monotonic()
        tally.done.append((now, now - began))
    elif "retry-after" in answer.headers:
        tally.retry_after.append(float(answer.headers["retry-after"]))


async def closed(
    client: httpx2.AsyncClient, mix: tuple[str, list[str]], concurrency: int, seconds: float
) -> tuple[Tally, float]:
    """`concurrency` requests always under way; the tally, and answers a second after the warm-up."""
    tally, began = Tally(), time.monotonic()

    async def one(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < began + seconds:
            await ask(client, body(chance, *mix), tally)

    await asyncio.gather(*(one(seed) for seed in range(concurrency)))
    return tally, rate(tally, began, seconds)


async def open_loop(
    client: httpx2.AsyncClient, mix: tuple[str, list[str]], per_second: float, seconds: float
) -> tuple[Tally, float]:
    """Requests at Poisson times; the tally of what ended while they were sent, and answers a second."""
    tally, began, chance = Tally(), time.monotonic(), random.Random(0)
    under_way: set[asyncio.Task[None]] = set()
    due = began
    while True:
        due += chance.expovariate(per_second)
        if due > began + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(ask(client, body(chance, *mix), tally))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
    goodput = rate(tally, began, seconds)
    tally.outcomes["under way at the end"] = len(under_way)
    for task in under_way:
        task.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)
    return tally, goodput


def rate(tally: Tally, began: float, seconds: float) -> float:
    """Whole answers a second between the end of the warm-up and the end."""
    first = began + WARM * seconds
    return sum(first <= when < began + seconds for when, _ in tally.done) / ((1 - WARM) * seconds)


def summary(tally: Tally, goodput: float) -> dict[str, Any]:
    """Figures of one load."""
    took = sorted(seconds for _, seconds in tally.done) or [float("nan")]
    at = {f"p{p}": took[min(len(took) - 1, int(p / 100 * len(took)))] for p in (50, 95, 99)}
    return {
        "sent": tally.sent,
        "outcomes": dict(tally.outcomes),
        "goodput_per_second": goodput,
        "latency_seconds": at,
        "least_retry_after": min(tally.retry_after, default=None),
    }


async def run(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Capacity, then every load."""
    limits = httpx2.Limits(max_connections=4096, max_keepalive_connections=256)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        attributes = [one["name"] for one in (await client.get("/v1/attributes")).json()["data"]]
        mix = (model, attributes)
        await closed(client, mix, 4, 5)
        tally, capacity = await closed(client, mix, arguments.concurrency, arguments.seconds)
        figures = {"closed": summary(tally, capacity)}
        for load in arguments.loads:
            # What the last load left is let go first.
            while (await client.get("/ready")).json().get("running_rows") != 0:
                await asyncio.sleep(0.2)
            found = await open_loop(client, mix, load * capacity, arguments.seconds)
            figures[f"{load:g}"] = summary(*found)
    return {"capacity_per_second": capacity, "seconds": arguments.seconds, "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with served(arguments.url) as url:
        result = asyncio.run(run(url, arguments))
    print("| load | sent | answers a second | against capacity | p50 | p95 | p99 | outcomes |\n" + "|---" * 8 + "|")
    for load, one in result["figures"].items():
        took = one["latency_seconds"]
        print(
            f"| {load} | {one['sent']} | {one['goodput_per_second']:.2f} | "
            f"{one['goodput_per_second'] / result['capacity_per_second']:.2f} | {took['p50']:.2f} s | "
            f"{took['p95']:.2f} s | {took['p99']:.2f} s | {one['outcomes']} |"
        )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
