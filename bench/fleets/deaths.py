"""A replica that is killed under load, and a restart of all of them one by one."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from bench.fleets.clients import Call, body, generate
from bench.fleets.parts import Fleet, Replica

TOKENS, STEPS = 32, 16


async def loaded(fleet: Fleet, at_once: int, act: Callable[[], None]) -> list[Call]:
    """Requests in a closed loop from before `act` until after it."""
    calls: list[Call] = []
    over = asyncio.Event()

    async def caller(number: int) -> None:
        count = 0
        while not over.is_set():
            calls.append(await generate(fleet, body(number * 100_000 + count, TOKENS, STEPS)))
            count += 1

    callers = [asyncio.create_task(caller(number)) for number in range(at_once)]
    while len(calls) < 2 * at_once:
        await asyncio.sleep(0.1)
    await asyncio.to_thread(act)
    after = len(calls)
    while len(calls) < after + 2 * at_once:
        await asyncio.sleep(0.1)
    over.set()
    await asyncio.gather(*callers)
    return calls


def killed(fleet: Fleet, at_once: int) -> dict[str, Any]:
    """kill -9 of the second replica."""
    victim = fleet.replicas[1]
    at: list[float] = []

    def act() -> None:
        at.append(time.monotonic())
        victim.stop(signal.SIGKILL)

    calls = asyncio.run(loaded(fleet, at_once, act))
    failed = [call for call in calls if call.outcome != "done"]
    served = Counter(line["request_id"] for line in fleet.reports() if line["status"] == 200)
    found = {
        "requests": len(calls),
        "at_once": at_once,
        "running_at_the_kill": sum(call.began < at[0] < call.ended for call in calls),
        "running_on_the_victim": sum(
            call.began < at[0] < call.ended and call.replica in (victim.name, "") for call in calls
        ),
        "ended_in_an_error": dict(Counter(f"{call.outcome} ({call.replica or 'no answer yet'})" for call in failed)),
        "errors_of_other_replicas": sum(call.replica not in (victim.name, "") for call in failed),
        "errors_of_requests_sent_after_it": sum(call.began > at[0] for call in failed),
        "served": len(calls) - len(failed),
        "served_twice": sum(served[call.id] > 1 for call in calls),
        "failed_and_served_elsewhere": sum(served[call.id] > 0 for call in failed),
    }
    victim.start()
    victim.wait_ready()
    return found


def restarted(fleet: Fleet, at_once: int) -> dict[str, Any]:
    """Each replica in turn: taken out of the proxy, ended with SIGTERM, started anew, put back."""
    codes: list[int] = []

    def one(replica: Replica) -> None:
        fleet.set_state(replica, "drain")
        # As endpoints take a while to be forgotten in a cluster.
        time.sleep(1.0)
        codes.append(replica.stop())
        replica.start()
        replica.wait_ready()
        fleet.set_state(replica, "ready")
        time.sleep(1.5)

    def act() -> None:
        for replica in fleet.replicas:
            one(replica)

    calls = asyncio.run(loaded(fleet, at_once, act))
    return {
        "requests": len(calls),
        "at_once": at_once,
        "endings": dict(Counter(call.outcome for call in calls)),
        "by_replica": dict(sorted(Counter(call.replica for call in calls).items())),
        "lost": sum(call.outcome != "done" for call in calls),
        "exit_codes": codes,
    }
