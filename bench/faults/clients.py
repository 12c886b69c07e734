"""Clients that leave, dawdle, or never finish what they began to say."""

import asyncio
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from bench.faults.http import EVENTS, LONG, SEED, SMALL, answered, connect, everybody, outcome, posted
from bench.faults.report import LEFT, LET_GO, Fault, Report
from bench.faults.server import PATIENCE, Served


async def leaves(server: Served, raw: bytes, when: Callable[[asyncio.StreamReader], Awaitable[Any]], rude: bool) -> str:
    """Send, and go away once `when` has come; rude: with a reset."""
    reader, writer = await connect(server)
    writer.write(raw)
    await writer.drain()
    await when(reader)
    if rude:
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )
    writer.close()
    return LEFT


def leaving(stage: str, count: int) -> Fault:
    """Clients that leave at a stage, every other one with a reset, while somebody else is served."""

    async def act(server: Served, report: Report) -> None:
        chance = random.Random(SEED)
        raws, whens = [], []
        for i in range(count):
            raw = posted(server, LONG | {"seed": i} | (EVENTS if stage == "while it streams" else {"n": 2}))
            body = raw.index(b"\r\n\r\n") + 4
            raws.append(raw[: chance.randrange(body, len(raw) - 1)] if stage == "before the body is complete" else raw)
            whens.append(_moment(server, stage, chance))
        other = asyncio.create_task(answered(server, posted(server, SMALL)))
        pairs = enumerate(zip(raws, whens, strict=True))
        gone = await asyncio.gather(*(leaves(server, raw, when, i % 2 == 0) for i, (raw, when) in pairs))
        report.outcomes = Counter(gone) + Counter([await other])

    return act


def _moment(server: Served, stage: str, chance: random.Random) -> Callable[[asyncio.StreamReader], Awaitable[Any]]:
    async def when(reader: asyncio.StreamReader) -> None:
        if stage == "while it streams":
            await reader.readuntil(b"data: ")
        elif stage != "before the body is complete":
            # The first take the places of the batch, the others wait.
            ready = await asyncio.to_thread(server.get, "/ready")
            while not ready["running_rows"]:
                ready = await asyncio.to_thread(server.get, "/ready")
        await asyncio.sleep(chance.random() * 0.3)

    return when


async def slow_readers(server: Served, report: Report) -> None:
    """Streams read a little at a time, and ordinary requests beside them."""

    async def slowly(raw: bytes) -> str:
        reader, writer = await connect(server, 4096)
        writer.write(raw)
        received = b""
        while piece := await reader.read(2048):
            received += piece
            await asyncio.sleep(0.02)
        writer.close()
        return outcome(received)

    slow = [slowly(posted(server, LONG | EVENTS | {"seed": i, "n": 2})) for i in range(10)]
    quick = [answered(server, posted(server, SMALL | {"seed": i})) for i in range(40)]
    report.outcomes = Counter(await asyncio.gather(*slow, *quick))


async def never_read(server: Served, report: Report) -> None:
    """Streams that are not read at all, whose clients hold on: how the server is rid of them."""
    writers, before, sent = [], server.left()["files"], server.sent
    for i in range(4):
        _, writer = await connect(server, 2048)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(posted(server, LONG | EVENTS | {"seed": i, "n": 8}))
        writers.append(writer)
    ids = {f"r{i}" for i in range(sent + 1, server.sent + 1)}
    quick = await everybody(server, [posted(server, SMALL | {"seed": i}) for i in range(20)])
    began = time.monotonic()
    while (files := server.left()["files"]) > before and time.monotonic() < began + PATIENCE:
        await asyncio.sleep(0.5)
    ended = Counter(line["outcome"] for line in server.reports() if line["request_id"] in ids)
    report.note = f"ended as {dict(ended)}; {files - before:.0f} of their connections still open after "
    report.note += f"{time.monotonic() - began:.0f} s"
    for writer in writers:
        writer.transport.abort()
    report.outcomes = Counter({LEFT: len(writers)}) + quick


async def silent(server: Served, report: Report) -> None:
    """Connections that never finish their headers, or their body."""
    raw = posted(server, SMALL)
    heads, bodies = [raw[:0]] * 50 + [raw[:40]] * 50, [posted(server, SMALL)[:-5] for _ in range(50)]
    began = time.monotonic()
    of_bodies, of_heads = await asyncio.gather(everybody(server, bodies), everybody(server, heads))
    report.outcomes = of_bodies + Counter({LET_GO if name == "closed" else name: n for name, n in of_heads.items()})
    report.requests = len(heads + bodies)
    report.note = f"the last one let go after {time.monotonic() - began:.0f} s"
