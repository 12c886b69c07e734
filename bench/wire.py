"""HTTP/1.1 as lightly as it can be spoken: a client that a load generator can afford on the server's own machine."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its body."""
        return json.loads(self.body)


class Client:
    """Requests to one server, over connections that are kept for the next one. Raises OSError or EOFError where a
    connection breaks before the answer is whole."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"the URL must be http://HOST:PORT, got {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, path: str) -> Reply:
        """GET."""
        return await self._ask(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """POST of JSON."""
        raw = json.dumps(body).encode()
        return await self._ask(
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw
        )

    async def _ask(self, raw: bytes) -> Reply:
        reader, writer = await self._connected()
        try:
            writer.write(raw)
            reply = await _read(reader)
        except BaseException:
            # Also where the asker is cancelled: the answer would be taken for the next one's.
            writer.transport.abort()
            raise
        if reply.headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return reply

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that nobody uses; the server closes those that nobody has used for a while."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        """Let every connection go."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _read(reader: asyncio.StreamReader) -> Reply:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return Reply(int(status.split(" ", 2)[1]), headers, body)
