"""Load on a running server: a mix of completions, sent in a closed loop or at random times, and what came of it."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from bench.usage import Usage
from bench.wire import Client


@dataclass(frozen=True)
class Target:
    """A server under load, and what is asked of it."""

    client: Client
    model: str
    attributes: tuple[str, ...]
    max_rows: int
    max_queue: int
    usage: Usage | None
    """Its processor time; None where it is another machine's."""


@dataclass
class Tally:
    """What came of the requests of one load while they were counted."""

    outcomes: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    """How long each whole answer took, in seconds."""
    tokens: int = 0
    """Response tokens of whole answers."""
    retry_after: list[float] = field(default_factory=list)
    answers: int = 0
    """Whole answers of the load so far, those of the warm-up included."""
    counting: bool = False


@dataclass(frozen=True)
class Figures:
    """One load, measured."""

    sent_per_second: float
    answers_per_second: float
    tokens_per_second: float
    outcomes: dict[str, int]
    latency_seconds: dict[str, float]
    least_retry_after: float | None
    cpu_share: dict[str, float] | None
    """Processor seconds a second: of the busiest thread, which is the engine's, and of all others together."""


def body(chance: random.Random, target: Target) -> dict[str, Any]:
    """One request of the mix: 16, 32 or 64 tokens in half as many steps, one of two steered by an attribute."""
    tokens = chance.choice((16, 32, 64))
    asked: dict[str, Any] = {
        "model": target.model,
        "prompt": "the",
        "max_tokens": tokens,
        "seed": chance.randrange(2**31),
        "diffusion": {"steps": tokens // 2, "ignore_eos": True},
    }
    if target.attributes and chance.random() < 0.5:
        asked["steering"] = {"interventions": [{"attribute": chance.choice(target.attributes)}]}
    return asked


async def ask(target: Target, asked: dict[str, Any], tally: Tally) -> bool:
    """Send one request and note what came of it; whether it was served."""
    began = time.monotonic()
    try:
        answer = await target.client.post("/v1/completions", asked)
    except (OSError, EOFError) as error:
        tally.outcomes[type(error).__name__] += tally.counting
        return False
    tally.answers += answer.status == 200
    if not tally.counting:
        return answer.status == 200
    tally.outcomes[str(answer.status)] += 1
    if answer.status == 200:
        tally.took.append(time.monotonic() - began)
        tally.tokens += answer.json["usage"]["completion_tokens"]
    elif "retry-after" in answer.headers:
        tally.retry_after.append(float(answer.headers["retry-after"]))
    return answer.status == 200


async def closed(target: Target, seconds: float, seed: int) -> Figures:
    """Twice as many clients as fit into a batch, each of which asks again once it has been answered."""

    async def one(tally: Tally, number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        while True:
            if not await ask(target, body(chance, target), tally):
                await asyncio.sleep(0.1)

    async def load(tally: Tally) -> None:
        await asyncio.gather(*(one(tally, number) for number in range(2 * target.max_rows)))

    return await measured(target, load, seconds)


async def open_loop(target: Target, per_second: float, over: bool, seconds: float, seed: int) -> Figures:
    """Requests at random times, whatever the answers; over: more than the server can do, so that its queue is filled
    before anything is counted, which would take it a while otherwise."""
    chance = random.Random(seed)

    async def load(tally: Tally) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(target.max_rows + over * target.max_queue):
                group.create_task(ask(target, body(chance, target), tally))
            began, sent = time.monotonic(), 0
            while True:
                # A Poisson process a second at a time, each second with the number that the rate says, so that luck
                # does not pass for a change of load.
                second = int(sent / per_second)
                count = round((second + 1) * per_second) - sent
                for due in sorted(second + chance.random() for _ in range(max(1, count))):
                    await asyncio.sleep(max(0.0, began + due - time.monotonic()))
                    group.create_task(ask(target, body(chance, target), tally))
                    sent += 1

    return await measured(target, load, seconds)


async def measured(target: Target, load: Callable[[Tally], Awaitable[None]], seconds: float) -> Figures:
    """Have a load run, and count what ends in `seconds` once two batches have been answered."""
    tally = Tally()
    running = asyncio.ensure_future(load(tally))
    while tally.answers < 2 * target.max_rows and not running.done():
        await asyncio.sleep(0.02)
    tally.counting, began = True, time.monotonic()
    before = target.usage.by_thread() if target.usage is not None else {}
    await asyncio.wait({running}, timeout=seconds)
    tally.counting, lasted = False, time.monotonic() - began
    after = target.usage.by_thread() if target.usage is not None else {}
    if running.done():
        await running
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return summary(tally, lasted, [after[one] - before.get(one, 0.0) for one in after])


def summary(tally: Tally, seconds: float, cpu: list[float]) -> Figures:
    """The figures of a tally of so many seconds; cpu: processor seconds of each thread."""
    took = sorted(tally.took) or [float("nan")]
    return Figures(
        sent_per_second=sum(tally.outcomes.values()) / seconds,
        answers_per_second=len(tally.took) / seconds,
        tokens_per_second=tally.tokens / seconds,
        outcomes=dict(tally.outcomes),
        latency_seconds={f"p{p}": took[min(len(took) - 1, int(p / 100 * len(took)))] for p in (50, 95, 99)},
        least_retry_after=min(tally.retry_after, default=None),
        cpu_share={"engine": max(cpu) / seconds, "others": (sum(cpu) - max(cpu)) / seconds} if cpu else None,
    )
