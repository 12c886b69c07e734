"""More requests than the server has room for."""

import asyncio
import random
import time
from collections import Counter

from bench.faults.http import SEED, SMALL, STEERED, answered, connect, outcome, posted
from bench.faults.report import Report
from bench.faults.server import PATIENCE, Served


async def thousand(server: Served, report: Report) -> None:
    """A thousand connections, all open before the first request is sent; every third streams, every other steers."""
    raws = []
    for i in range(1000):
        extra = (STEERED if i % 2 else {}) | ({"stream": True} if i % 3 == 0 else {})
        raws.append(posted(server, SMALL | extra | {"seed": i}))
    pairs = await asyncio.gather(*(connect(server) for _ in raws))

    async def one(pair: tuple[asyncio.StreamReader, asyncio.StreamWriter], raw: bytes) -> str:
        pair[1].write(raw)
        received = await asyncio.wait_for(pair[0].read(), PATIENCE)
        pair[1].close()
        return outcome(received)

    report.outcomes = Counter(await asyncio.gather(*map(one, pairs, raws)))


async def overload(server: Served, report: Report) -> None:
    """Four times the measured capacity for 30 s, at Poisson times."""
    chance = random.Random(SEED)
    until = time.monotonic() + 8

    async def closed(seed: int) -> int:
        count = 0
        while time.monotonic() < until:
            count += await answered(server, posted(server, SMALL | {"seed": seed})) == "200"
        return count

    capacity = sum(await asyncio.gather(*map(closed, range(32)))) / 8
    tasks: list[asyncio.Task[str]] = []
    due = time.monotonic()
    end = due + 30
    while (due := due + chance.expovariate(4 * capacity)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(answered(server, posted(server, SMALL | {"seed": len(tasks)}))))
    done = sum(task.done() and task.result() == "200" for task in tasks)
    report.outcomes = Counter(await asyncio.gather(*tasks))
    report.requests = len(tasks)
    report.note = f"capacity {capacity:.1f}/s in a closed loop of 32; {done / 30:.1f}/s answered while overloaded"
