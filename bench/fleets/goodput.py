"""Answers a second of one replica and of three, in turn, in one run."""

import asyncio
import time
from typing import Any, Final

from bench.fleets.clients import body, generate
from bench.fleets.parts import Fleet

IN_TIME: Final = 10.0
"""Seconds within which an answer is a good one."""
TOKENS, STEPS = 32, 16


async def closed(fleet: Fleet, callers: int, seconds: float, seed: int) -> dict[str, float | None]:
    """So many callers, each of which asks again once it has been answered; what ends in time is counted."""
    took: list[float] = []
    until = time.monotonic() + seconds

    async def caller(number: int) -> None:
        count = 0
        while time.monotonic() < until:
            call = await generate(fleet, body(seed + number * 10_000 + count, TOKENS, STEPS))
            count += 1
            if call.outcome == "done" and call.ended < until:
                took.append(call.ended - call.began)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    good = sorted(one for one in took if one <= IN_TIME)
    middle = round(good[len(good) // 2], 2) if good else None
    return {"good_per_second": round(len(good) / seconds, 2), "median_seconds": middle}


def shown(fleet: Fleet, callers: int, seconds: float, rounds: int) -> dict[str, Any]:
    """One replica (the others taken out of the proxy) and three, `rounds` times in turn."""
    found: dict[str, Any] = {"callers": callers, "seconds": seconds, "in_time_seconds": IN_TIME, "one": [], "three": []}
    for turn in range(rounds):
        for name in ("one", "three"):
            for other in fleet.replicas[1:]:
                fleet.set_state(other, "maint" if name == "one" else "ready")
            time.sleep(1.5)
            found[name].append(asyncio.run(closed(fleet, callers, seconds, 10**6 * turn)))
    return found
