"""An app called by hand: the client's side of ASGI, with chunked bodies and disconnects at will."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from tests.server.text_engine import TextEngine, service_of


@asynccontextmanager
async def running(engine: TextEngine, config: ServerConfig | None = None) -> AsyncIterator[FastAPI]:
    app = create_app(service_of(engine), config or ServerConfig(drain_seconds=5))
    async with app.router.lifespan_context(app):
        yield app


class Call:
    """One request; `gone` set means that the client has closed its connection."""

    def __init__(
        self, path: str, body: Any = None, chunks: list[bytes] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self.chunks = chunks if chunks is not None else [json.dumps(body).encode()]
        self.gone = asyncio.Event()
        self.first_byte = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.complete = False
        self.received = 0
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

    async def receive(self) -> dict[str, Any]:
        if self.received < len(self.chunks):
            self.received += 1
            more = self.received < len(self.chunks)
            return {"type": "http.request", "body": self.chunks[self.received - 1], "more_body": more}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
            self.first_byte.set()

    async def run(self, app: FastAPI) -> "Call":
        await app(self.scope, self.receive, self.send)
        return self
