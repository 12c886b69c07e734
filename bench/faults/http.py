"""Requests as bytes, and the outcome of what came back for them."""

import asyncio
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.faults.server import PATIENCE, Served, started

SEED = 6
SMALL: dict[str, Any] = {
    "model": "bundled",
    "prompt": "the",
    "max_tokens": 16,
    "diffusion": {"steps": 8, "ignore_eos": True},
}
LONG: dict[str, Any] = {"model": "bundled", "max_tokens": 96, "diffusion": {"steps": 96, "ignore_eos": True}}
STEERED: dict[str, Any] = {"steering": {"interventions": [{"attribute": "topic/sports"}]}}
EVENTS: dict[str, Any] = {"stream": True, "diffusion": LONG["diffusion"] | {"stream_mode": "events"}}
WARM: tuple[dict[str, Any], ...] = (
    *(SMALL | STEERED | {"seed": i} for i in range(4)),
    LONG | {"n": 4, "diffusion": {"steps": 4, "ignore_eos": True}},
    LONG | {"n": 4, "stream": True, "diffusion": {"steps": 4, "ignore_eos": True}},
)
"""What a server does before its first fault, so that its pools and caches are there."""


@contextmanager
def served(*flags: str, full: bool = False) -> Iterator[Served]:
    """A server of its own that has served already; its logs go to /dev/full where `full`."""
    with started(*flags, full=full) as server:
        asyncio.run(everybody(server, [posted(server, one) for one in WARM * 16]))
        yield server


def posted(server: Served, body: Any, *headers: str, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """A POST that closes its connection after the answer, with an id of its own."""
    server.sent += 1
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: bench",
        "Connection: close",
        f"X-Request-Id: r{server.sent}",
        f"Content-Length: {len(raw) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw


def outcome(received: bytes) -> str:
    """A name for all that came back: the status, and whether a 200 is whole, `cut`, or ended more than once."""
    if not received:
        return "closed"
    head, _, body = received.partition(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    if status != "200":
        return status if b'"error"' in body or status == "400" else f"{status} cut"
    if b"text/event-stream" in head:
        frames = body.count(b"data: [DONE]\n\n") + body.count(b'data: {"error":')
        if frames != 1:
            return f"200 with {frames} ends"
        return "200 [DONE]" if b"[DONE]" in body else "200 error event"
    length = int(re.findall(rb"content-length: (\d+)", head)[0])
    return "200" if len(body) == length and b'"object":' in body else "200 cut"


def ended_once(name: str) -> bool:
    """Tell if an outcome is exactly one terminal answer."""
    return name.isdigit() or name in ("200 [DONE]", "200 error event")


async def connect(server: Served, buffer: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection; buffer: bytes the client's side takes before it is read."""
    client = socket.socket()
    client.setblocking(False)
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
    return await asyncio.open_connection(sock=client, limit=buffer or 2**16)


async def answered(server: Served, raw: bytes) -> str:
    """Send, and read to the end."""
    try:
        reader, writer = await connect(server)
        writer.write(raw)
        received = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
    except ConnectionError as error:
        return type(error).__name__
    return outcome(received)


async def everybody(server: Served, raws: Sequence[bytes], at_once: int = 2000) -> Counter[str]:
    """The outcomes of all of these."""
    gate = asyncio.Semaphore(at_once)

    async def one(raw: bytes) -> str:
        async with gate:
            return await answered(server, raw)

    return Counter(await asyncio.gather(*map(one, raws)))
