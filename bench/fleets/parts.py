"""The parts of a fleet as processes of this machine: three replicas, a Redis, a HAProxy before them."""

import hashlib
import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PATIENCE: Final = 600.0
KEYS: Final[dict[str, dict[str, int]]] = {
    "free": {},
    "rate": {"rate_per_minute": 60},
    "other": {"rate_per_minute": 60},
    "few": {"max_concurrent": 4},
}
"""Keys by name, and their limits."""

PROXY: Final = """
global
    stats socket {socket} mode 600 level admin
    maxconn 4096
defaults
    mode http
    timeout connect 2s
    timeout client 10m
    timeout server 10m
    option redispatch 1
    retries 3
    # Neither has begun any work: a refused connection, and a replica that says so.
    retry-on conn-failure 503
frontend callers
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance leastconn
    option httpchk
    http-check send meth GET uri /ready
    default-server check inter 1s fall 2 rise 1
    http-response set-header x-replica %s
"""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Replica:
    """One server; a start after a stop is another process with another log."""

    name: str
    port: int
    folder: Path
    flags: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    logs: list[Path] = field(default_factory=list)

    def start(self) -> None:
        """Start it; it is ready some time later."""
        self.logs.append(self.folder / f"{self.name}-{len(self.logs)}.jsonl")
        where = ["--port", str(self.port), "--replica-address", f"127.0.0.1:{self.port}"]
        command = [sys.executable, "-m", "steerserve.cli", "serve", *where, *self.flags]
        with open(self.logs[-1], "wb") as out, open(self.folder / f"{self.name}.err", "ab") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err)

    def wait_ready(self) -> None:
        """Wait until it takes requests."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} has ended: {(self.folder / f'{self.name}.err').read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"{self.name} is not ready")

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        assert self.process is not None
        self.process.send_signal(sig)
        return self.process.wait(PATIENCE)

    def metric(self, name: str) -> float:
        """A metric without labels."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics", headers=self.auth)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    auth: dict[str, str] = field(default_factory=dict)

    def reports(self) -> list[dict[str, Any]]:
        """The lines of its logs."""
        return [
            json.loads(line) for path in self.logs for line in path.read_bytes().splitlines() if line.endswith(b"}")
        ]


class Redis:
    """Keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        self._process = subprocess.Popen(["redis-server", *where, "--save", ""], stdout=subprocess.DEVNULL)
        wait_listening(self.port)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass
class Fleet:
    """The whole of it; requests go to `port`, HAProxy's."""

    replicas: list[Replica]
    redis: Redis
    port: int
    secrets: dict[str, str]
    admin: Path

    def told(self, command: str) -> str:
        """What HAProxy answers to a command on its socket."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.admin))
            client.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()

    def set_state(self, replica: Replica, state: str) -> None:
        """Have HAProxy take a replica for `ready`, `drain` or `maint`."""
        if said := self.told(f"set server replicas/{replica.name} state {state}").strip():
            raise RuntimeError(said)

    def reports(self) -> list[dict[str, Any]]:
        """The lines of all logs, each with the replica that wrote it."""
        return [line | {"replica": one.name} for one in self.replicas for line in one.reports()]


def wait_listening(port: int) -> None:
    """Wait until somebody listens."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nobody listens on {port}")


@contextmanager
def fleet(folder: Path, count: int = 3, failure: str = "open", flags: tuple[str, ...] = ()) -> Iterator[Fleet]:
    """A fleet of `count` replicas that is ready; everything is stopped at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = {name: secrets.token_urlsafe(32) for name in KEYS}
    hashes = {name: hashlib.sha256(one.encode()).hexdigest() for name, one in made.items()}
    entries = [{"name": name, "sha256": hashes[name], **limits} for name, limits in KEYS.items()]
    (folder / "keys.json").write_text(json.dumps(entries))
    (folder / "secret").write_text(secrets.token_urlsafe(48))
    redis = Redis(folder)
    limits = ("--limits-store", redis.url, "--limits-store-failure", failure)
    shared = ("--keys", str(folder / "keys.json"), "--fleet-secret", str(folder / "secret"))
    common = (*shared, *limits, "--threads", "1", *flags)
    auth = {"authorization": f"Bearer {made['free']}"}
    replicas = [Replica(f"r{i}", free_port(), folder, common, auth=auth) for i in range(1, count + 1)]
    port, admin = free_port(), folder / "proxy.sock"
    lines = "".join(f"    server {one.name} 127.0.0.1:{one.port}\n" for one in replicas)
    (folder / "haproxy.cfg").write_text(PROXY.format(socket=admin, port=port) + lines)
    proxy = None
    try:
        redis.start()
        for one in replicas:
            one.start()
        for one in replicas:
            one.wait_ready()
        with open(folder / "haproxy.err", "wb") as err:
            proxy = subprocess.Popen(["haproxy", "-db", "-f", str(folder / "haproxy.cfg")], stdout=err, stderr=err)
        wait_listening(port)
        yield Fleet(replicas, redis, port, made, admin)
    finally:
        for process in [one.process for one in replicas] + [proxy]:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(PATIENCE)
        redis.kill()
