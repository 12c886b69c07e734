"""Callers of the fleet: a generation as a stream, and what is done to it while it runs."""

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Final

from bench.fleets.parts import PATIENCE, Fleet

MODEL: Final = "bundled"
FIRST: Final = "topic/sports"
"""What a request pushes."""
SECOND: Final = "sentiment/positive"
"""What a PATCH pushes in its place."""


@dataclass
class Reply:
    """A whole answer, or as much of it as came."""

    status: int
    """0 where nothing came."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False

    @property
    def code(self) -> str:
        """The code of the error it holds; empty where there is none."""
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, KeyError):
            return ""


@dataclass
class Call:
    """One generation as its caller saw it."""

    id: str
    """Its request id."""
    began: float
    ended: float = 0.0
    replica: str = ""
    """Who answered, as HAProxy says."""
    generation: str = ""
    outcome: str = ""
    """`done`, the code of an error, or `broken` for a connection that ended before the stream."""
    receipt: dict[str, Any] | None = None
    change: str = ""
    """PATCH or DELETE."""
    changed: Reply | None = None
    trace: str = ""
    """Trace id of the change."""


def body(seed: int, tokens: int, steps: int) -> dict[str, Any]:
    """A steered completion, as a stream."""
    return {
        "model": MODEL,
        "prompt": "the",
        "max_tokens": tokens,
        "seed": seed,
        "stream": True,
        "diffusion": {"steps": steps, "ignore_eos": True},
        "steering": {"interventions": [{"attribute": FIRST}]},
    }


async def generate(fleet: Fleet, asked: dict[str, Any], change: str = "", key: str = "free") -> Call:
    """Send a request through the proxy, change its generation as soon as its id is known, and read to the end."""
    call = Call(f"req-{secrets.token_hex(8)}", time.monotonic(), change=change)
    frames: list[bytes] = []
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
        try:
            writer.write(_raw("POST", "/v1/completions", asked, fleet.secrets[key], {"x-request-id": call.id}))
            status, headers = await _head(reader)
            call.replica, call.generation = headers.get("x-replica", ""), headers.get("x-generation-id", "")
            acting = None
            if change and call.generation:
                acting = asyncio.create_task(_act(fleet, call, key))
            reply = await _rest(reader, status, headers)
            if acting is not None:
                call.changed = await acting
        finally:
            writer.close()
        frames = [line for line in reply.body.split(b"\n\n") if line.startswith(b"data: ")]
        call.outcome = reply.code if status != 200 else _end(frames, call)
        if status != 200 and not call.outcome:
            call.outcome = f"{status}"
    except (OSError, EOFError):
        call.outcome = "broken"
    call.ended = time.monotonic()
    return call


async def ask(fleet: Fleet, method: str, path: str, data: Any, key: str, headers: dict[str, str]) -> Reply:
    """One request through the proxy and its whole answer."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
        try:
            writer.write(_raw(method, path, data, fleet.secrets[key], headers))
            return await _rest(reader, *await _head(reader))
        finally:
            writer.close()
    except (OSError, EOFError):
        return Reply(0)


async def crowd(calls: list[Any], at_once: int) -> list[Any]:
    """The results of so many coroutines, `at_once` at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(call: Any) -> Any:
        async with gate:
            return await call

    return list(await asyncio.gather(*map(one, calls)))


async def _act(fleet: Fleet, call: Call, key: str) -> Reply:
    call.trace = secrets.token_hex(16)
    headers = {"x-request-id": f"{call.id}-change", "traceparent": f"00-{call.trace}-{secrets.token_hex(8)}-01"}
    data = {"steering": {"interventions": [{"attribute": SECOND}]}} if call.change == "PATCH" else None
    return await ask(fleet, call.change, f"/v1/generations/{call.generation}", data, key, headers)


def _end(frames: list[bytes], call: Call) -> str:
    """How a stream ended: exactly one `[DONE]` or error, else `broken` or `twice`."""
    ends = []
    for line in frames:
        text = line.removeprefix(b"data: ")
        if text == b"[DONE]":
            ends.append("done")
            continue
        frame = json.loads(text)
        if "error" in frame:
            ends.append(str(frame["error"]["code"]))
        for choice in frame.get("choices", ()):
            call.receipt = choice.get("steering") or call.receipt
    return ends[0] if len(ends) == 1 else ("twice" if ends else "broken")


def _raw(method: str, path: str, data: Any, secret: str, headers: dict[str, str]) -> bytes:
    raw = b"" if data is None else json.dumps(data).encode()
    told = {"host": "bench", "connection": "close", "authorization": f"Bearer {secret}", **headers}
    if data is not None:
        told |= {"content-type": "application/json", "content-length": str(len(raw))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
    status, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(status.split(" ", 2)[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _rest(reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> Reply:
    """The body to its end; raises EOFError where it breaks."""
    if "content-length" in headers:
        return Reply(
            status, headers, await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), PATIENCE), True
        )
    if headers.get("transfer-encoding") != "chunked":
        return Reply(status, headers, await asyncio.wait_for(reader.read(), PATIENCE), True)
    body = b""
    while True:
        size = int(await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE), 16)
        body += (await asyncio.wait_for(reader.readexactly(size + 2), PATIENCE))[:-2]
        if not size:
            return Reply(status, headers, body, True)
