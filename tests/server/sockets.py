"""A server on a real socket in a thread of this process, and clients that misbehave byte by byte."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import FastAPI

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.http.observe import Report
from steerserve.server.process import ServerProcess
from steerserve.server.telemetry.record import RequestRecord
from tests.server.clock import skipped
from tests.server.text_engine import TextEngine, service_of

PATIENCE = 60.0


@dataclass(frozen=True)
class Listening:
    """A server that listens."""

    app: FastAPI
    port: int
    visits: list[RequestRecord]
    """Every request that has ended."""
    loop: asyncio.AbstractEventLoop

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def exchange(self, raw: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        with self.connect() as client:
            # What is refused for its length may be refused before all of it has been sent.
            with suppress(ConnectionError):
                client.sendall(raw)
            return read_all(client)

    def skip(self, seconds: float) -> None:
        """Let so many seconds have passed for the server, which sees them to their end."""
        asyncio.run_coroutine_threadsafe(skipped(seconds), self.loop).result(PATIENCE)


@contextmanager
def listening(
    engine: TextEngine, config: ServerConfig | None = None, *reports: Report, port: int = 0
) -> Iterator[Listening]:
    """Leaving it stops the server and waits for its end."""
    config = replace(config or ServerConfig(drain_seconds=5), port=port)
    visits: list[RequestRecord] = []
    app = create_app(service_of(engine), config, [visits.append, *reports])
    # It would be read again at a signal, which only a main thread can wait for.
    app.state.reload = None
    found: list[tuple[int, asyncio.AbstractEventLoop]] = []
    ready = threading.Event()

    def is_ready(_: str, port: int) -> None:
        found.append((port, asyncio.get_running_loop()))
        ready.set()

    process = ServerProcess(app, config, lambda _: None, is_ready)
    thread = threading.Thread(target=process.serve_until_stopped)
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        [(port, loop)] = found
        yield Listening(app, port, visits, loop)
    finally:
        process.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def request(body: bytes, *headers: str, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """A POST that closes its connection after the answer."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def read_all(client: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            piece = client.recv(65536)
        except ConnectionError:
            return received
        if not piece:
            return received
        received += piece


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if os.path.isdir("/proc/self/fd") else 0


def eventually(holds: Callable[[], object]) -> None:
    """Wait until it holds; fails after a patience that only a hang uses up."""
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.005)
