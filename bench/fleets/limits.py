"""A key with 60 requests a minute, and one with 4 at once: with the store, without it, and with it again."""

import asyncio
import time
from collections import Counter
from typing import Any

from bench.fleets.clients import MODEL, Reply, ask, body, crowd, generate
from bench.fleets.parts import PATIENCE, Fleet

TINY: dict[str, Any] = {"model": MODEL, "prompt": "the", "max_tokens": 1, "seed": 1}
AT_ONCE = 6


def burst(fleet: Fleet, key: str, count: int) -> dict[str, Any]:
    """So many requests as fast as they are answered: how many got which answer, and within how long."""
    began = time.monotonic()
    asked = [ask(fleet, "POST", "/v1/completions", TINY, key, {}) for _ in range(count)]
    replies: list[Reply] = asyncio.run(crowd(asked, AT_ONCE))
    return {
        "requests": count,
        "answers": dict(Counter(f"{one.status} {one.code}".strip() for one in replies)),
        "seconds": round(time.monotonic() - began, 1),
    }


def at_once(fleet: Fleet) -> dict[str, Any]:
    """Three times as many long requests at once as the key may have."""
    calls = asyncio.run(crowd([generate(fleet, body(i, 96, 96), key="few") for i in range(12)], 12))
    return {"requests": len(calls), "allowed": 4, "endings": dict(Counter(call.outcome for call in calls))}


def shown(fleet: Fleet, failure: str) -> dict[str, Any]:
    """The whole story under one setting of --limits-store-failure."""
    found: dict[str, Any] = {"rate_per_minute": 60, "store_there": burst(fleet, "rate", 180)}
    found["at_once"] = at_once(fleet)
    fleet.redis.kill()
    began = time.monotonic()
    found["store_killed"] = burst(fleet, "rate", 240)
    found["store_killed_without_limits"] = burst(fleet, "free", 12)
    _until(fleet, 0.0)
    found["said_in_metrics"] = [one.metric("steerserve_limits_store_up") for one in fleet.replicas]
    found["away_seconds"] = round(time.monotonic() - began, 1)
    fleet.redis.start()
    began = time.monotonic()
    _until(fleet, 1.0)
    found["back_within_seconds"] = round(time.monotonic() - began, 1)
    found["store_back"] = burst(fleet, "other", 180)
    found["said_in_log"] = sum(
        (one.folder / f"{one.name}.err").read_text().count("the store of limits is") for one in fleet.replicas
    )
    found["failure"] = failure
    return found


def _until(fleet: Fleet, up: float) -> None:
    """Wait until every replica says that the store is there, or away."""
    until = time.monotonic() + PATIENCE
    while any(one.metric("steerserve_limits_store_up") != up for one in fleet.replicas):
        if time.monotonic() > until:
            raise RuntimeError("the replicas do not notice")
        time.sleep(0.1)
