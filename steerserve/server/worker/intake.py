"""Intake of the engine: if it takes work, and the rows that are on their way to the engine's queue."""

import threading
import time

from steerserve.server.errors import EngineDownError, ShuttingDownError


class Intake:
    """Asked and told from any thread. `lock` is held by whoever hands the engine's thread a command, so that each is
    either noted before that thread ends, and answered, or refused; and while rows go from their way into the queue, so
    that nobody counts them twice or not at all."""

    def __init__(self, restart_seconds: float) -> None:
        """restart_seconds: how long a new server takes to be ready."""
        self.lock = threading.Lock()
        self.restart_seconds = restart_seconds
        self.down: str | None = "the engine has not been started"
        """Why no work is taken; None while the engine runs."""
        self.failed = False
        """True once the engine has ended without being told to: nothing but a new process helps."""
        self.arriving = 0
        """Rows that have been handed over and that the engine has yet to take or to refuse."""
        self._draining_until: float | None = None

    def open(self) -> None:
        """Take work from now on."""
        self.down = None

    def drain(self, seconds: float) -> None:
        """Refuse new requests, for good; those that run have so many seconds."""
        with self.lock:
            self._draining_until = time.monotonic() + seconds

    def shut(self, reason: str, failed: bool) -> None:
        """Take no more work, for the first reason that was given."""
        with self.lock:
            self.down = self.down or reason
            self.failed = self.failed or failed

    def check_up(self) -> None:
        """Raise EngineDownError where the engine does not run."""
        if self.down is not None:
            raise EngineDownError(self.down, self.restart_seconds)

    def check(self) -> None:
        """Raise EngineDownError or ShuttingDownError where no new request is taken."""
        self.check_up()
        if self._draining_until is not None:
            raise ShuttingDownError("the server is shutting down", self._draining_until - time.monotonic())
