"""The server that is done harm to: a process of its own, and what it holds."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from bench.usage import Usage

PATIENCE = 300.0
IDLE_SECONDS = 15.0


@dataclass
class Served:
    """A server process; `log` holds its standard output."""

    process: subprocess.Popen[bytes]
    port: int
    log: BinaryIO | None
    sent: int = 0

    def held(self) -> dict[str, float]:
        """Files, threads and MiB it has now."""
        return Usage(self.process.pid).held()

    def left(self) -> dict[str, float]:
        """The same and rows, of a server that is ready."""
        ready = self.get("/ready")
        return self.held() | {"rows": ready["running_rows"] + ready["queue_length"]}

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def settled(self, before: dict[str, float]) -> dict[str, float]:
        """What it has once nothing runs and no file is left over, or after a while in any case."""
        until = time.monotonic() + IDLE_SECONDS
        while (now := self.left())["rows"] or (now["files"] > before["files"] and time.monotonic() < until):
            time.sleep(0.2)
        return now

    def lines(self) -> Counter[str]:
        """How many lines of the log each request id has."""
        return Counter(line["request_id"] for line in self.reports())

    def reports(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        if self.log is None:
            return []
        self.log.seek(0)
        return [json.loads(line) for line in self.log.read().splitlines()]


@contextmanager
def started(*flags: str, port: int | None = None, full: bool = False) -> Iterator[Served]:
    """A server of its own, ready; its logs go to /dev/full where `full`."""
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--port", str(port), *flags]
    with tempfile.TemporaryFile() as log, open("/dev/full", "wb") as nowhere:
        out, err = (nowhere, nowhere) if full else (log, subprocess.DEVNULL)
        server = Served(subprocess.Popen(command, stdout=out, stderr=err), port, None if full else log)
        try:
            wait_ready(server)
            yield server
        finally:
            server.process.terminate()
            server.process.wait(PATIENCE)


def wait_ready(server: Served) -> None:
    """Wait for a server that has just been started."""
    until = time.monotonic() + PATIENCE
    while True:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server did not start: exit code {server.process.returncode}")
        try:
            server.get("/ready")
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        else:
            return
