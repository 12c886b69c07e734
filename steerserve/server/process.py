"""The server as a process: its listeners, its signals, and how it ends."""

import asyncio
import errno
import ipaddress
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any
from wsgiref.simple_server import WSGIServer

from fastapi import FastAPI
from prometheus_client import start_http_server
from uvicorn import Config, Server

from steerserve.config import ServerConfig
from steerserve.errors import SteerserveError
from steerserve.server.agent_check import AgentCheck
from steerserve.server.http.connection import Connection
from steerserve.server.watch import Watch

logger = logging.getLogger(__name__)

STOPPED = 0
DID_NOT_START = 1
ENGINE_FAILED = 70

ANSWER_SECONDS = 5
"""How long the last answers may take to be sent once every row has ended."""
MOST_FILES = 65536
"""Open files asked of the system: every connection is one."""
SWITCH_SECONDS = 0.0005
"""How long a thread may go on in Python while another waits for its turn. Each operation of the engine's thread gives
the interpreter up and has to get it back: at Python's 5 ms, a busy loop of connections holds it up at every one."""


class ServerProcess(Server):
    """Serves an app of `create_app` until a signal or the end of its engine.

    The first SIGTERM or SIGINT lets running rows finish for a while and then ends them with an answer, the second ends
    them at once, the third does not wait for answers to be sent. SIGHUP has the file of keys, attributes and vectors
    read again.
    """

    def __init__(
        self, app: FastAPI, config: ServerConfig, said: Callable[[str], None], ready: Callable[[str, int], None]
    ) -> None:
        """said: takes a line for whoever started the server; ready: is told host and port once it listens."""
        super().__init__(
            Config(
                app,
                host=config.host,
                port=config.port,
                log_config=None,
                log_level="warning",
                access_log=False,
                # Of h11: the one of the two that bounds the size of headers.
                http=Connection,
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=ANSWER_SECONDS,
            )
        )
        self._app = app
        self._config = config
        self._said = said
        self._ready = ready
        self._signals = 0
        self._watches: list[Watch] = []
        self._metrics: tuple[WSGIServer, threading.Thread] | None = None
        self._agent = AgentCheck(app.state.worker)

    def serve_until_stopped(self) -> int:
        """Serve; the exit code of the process."""
        allow_many_files()
        sys.setswitchinterval(SWITCH_SECONDS)
        self.run()
        if not self.started:
            return DID_NOT_START
        return ENGINE_FAILED if self._app.state.worker.intake.failed else STOPPED

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where (port 0 is one that the system picks)."""
        self._serve_metrics()
        await self._serve_agent()
        try:
            await super().startup(sockets)
        except SystemExit:
            # uvicorn has logged why, and would end the process with a code of its own.
            self.should_exit = True
            return
        reload = self._app.state.reload
        if reload is not None:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, reload.all))
            if self._config.reload_seconds is not None:
                self._watches = reload.watches(self._config.reload_seconds)
            for watch in self._watches:
                watch.start()
        if self._app.state.keyring is None and not is_loopback(self._config.host):
            self._said(f"no --keys: whoever reaches {self._config.host} is served")
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._ready(host, port)

    async def on_tick(self, counter: int) -> bool:
        """Return True to stop: on a signal, or when nothing is left to serve with."""
        return await super().on_tick(counter) or self._app.state.worker.intake.failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, let running rows finish for a while, end the rest with an answer, then close."""
        # Before uvicorn's own: it cancels what still runs after its time-out, and a cancelled answer is cut off,
        # where the worker ends each row with a proper one.
        for watch in self._watches:
            await asyncio.to_thread(watch.stop)
        worker = self._app.state.worker
        await asyncio.to_thread(worker.drain, self._config.drain_seconds)
        await asyncio.to_thread(worker.close)
        await self._agent.close()
        await super().shutdown(sockets)
        if self._metrics is not None:
            server, thread = self._metrics
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            thread.join()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Take a signal to stop. It is not raised again at the end: to stop when told to is a success."""
        self._signals += 1
        self.should_exit = True
        if self._signals == 2:
            # Not from the signal's own frame, which may have interrupted whoever holds the worker's lock.
            threading.Thread(target=self._app.state.worker.stop, name="stop", daemon=True).start()
        self.force_exit = self._signals > 2

    def _serve_metrics(self) -> None:
        port = self._config.metrics_port
        if port is None:
            return
        try:
            self._metrics = start_http_server(port, self._config.host, self._app.state.metrics.registry)
        except OSError as error:
            raise SteerserveError(f"--metrics-port {port}: {error}") from error
        host, port = self._metrics[0].server_address[:2]
        self._said(f"metrics at {address_of(str(host), port)}/metrics")

    async def _serve_agent(self) -> None:
        port = self._config.agent_port
        if port is None:
            return
        try:
            host, port = await self._agent.listen(self._config.host, port)
        except OSError as error:
            raise SteerserveError(f"--agent-port {port}: {error}") from error
        self._said(f"agent check at {address_of(host, port).removeprefix('http://')}")


def check_address(flag: str, host: str, port: int) -> None:
    """Raise SteerserveError, naming the flag, where nothing can listen: to be asked before a model is loaded."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SteerserveError(f"--host {host}: {error.strerror}") from error
    faults = [fault for family, _, _, _, place in places if (fault := _fault(family, place)) is not None]
    # A name may have addresses of a kind that this machine does not speak.
    missing = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    if telling := [one for one in faults if one.errno not in missing] or (faults if len(faults) == len(places) else []):
        where = f"--host {host}" if telling[0].errno in missing else f"{flag} {port}"
        raise SteerserveError(f"{where}: {telling[0].strerror}")


def _fault(family: int, place: Any) -> OSError | None:
    """Why nothing can listen at an address; None where something can."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(place)
    except OSError as error:
        return error
    return None


def address_of(host: str, port: int) -> str:
    """The URL of a listener."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Tell if only this machine reaches a listener on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allow_many_files() -> None:
    """Raise the process's limit on open files as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
