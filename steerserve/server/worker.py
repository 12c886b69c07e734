"""The one thread that owns an engine, and the asyncio side's way of talking to it.

Commands go in through a thread-safe queue; events come out to each request's own loop. With nothing to run the
thread sleeps in the queue.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from steerserve.engine.base import Engine
from steerserve.engine.events import Done, Event, Failed
from steerserve.errors import QueueFullError, SteerserveError
from steerserve.server.errors import EngineDownError
from steerserve.server.subscription import Subscription

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Add:
    requests: list[Any]
    subscription: Subscription
    accepted: "asyncio.Future[None]"


@dataclass(frozen=True)
class _Abort:
    ids: tuple[str, ...]


@dataclass(frozen=True)
class _Drain:
    drained: threading.Event


@dataclass(frozen=True)
class _Close:
    pass


_Command = _Add | _Abort | _Drain | _Close


class EngineWorker:
    """Runs an engine in a thread of its own: `submit` and `abort` from any loop, the rest from anywhere."""

    def __init__(self, engine: Engine, on_step: Callable[[float], None]) -> None:
        self._engine = engine
        self._on_step = on_step
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards the three below: a command is either queued before the thread ends, and answered, or refused.
        self._gate = threading.Lock()
        self._down: str | None = "the engine has not been started"
        self._draining: float | None = None
        # The thread's own.
        self._live: dict[str, Subscription] = {}
        self._drains: list[threading.Event] = []

    @property
    def down(self) -> str | None:
        """Why no work is taken; None while the engine runs."""
        return self._down

    @property
    def draining(self) -> bool:
        """Whether new requests are refused while the running ones finish."""
        return self._draining is not None

    def start(self) -> None:
        """Start the thread; once."""
        self._down = None
        self._thread.start()

    async def submit(self, requests: list[Any]) -> Subscription:
        """Add admitted requests, all or none; raises QueueFullError or EngineDownError.

        Every request of the subscription gets exactly one Done or Failed.
        """
        subscription = Subscription(requests)
        accepted = subscription.loop.create_future()
        with self._gate:
            if self._down is not None:
                raise EngineDownError(self._down)
            if self._draining is not None:
                raise QueueFullError("the server is shutting down", self._draining)
            self._commands.put(_Add(requests, subscription, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self.abort(subscription.ids)
            raise
        return subscription

    def abort(self, ids: Iterable[str]) -> None:
        """Free these rows before the next step; ids that have finished are ignored."""
        self._command(_Abort(tuple(ids)))

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones; false where `timeout` seconds did not suffice."""
        drained = threading.Event()
        with self._gate:
            self._draining = max(timeout, 1.0)
        return not self._command(_Drain(drained)) or drained.wait(timeout)

    def close(self) -> None:
        """Close the engine; what still runs ends in Failed. Waits for the thread."""
        self._command(_Close())
        if self._thread.ident is not None:
            self._thread.join()

    def _command(self, command: _Command) -> bool:
        with self._gate:
            if self._down is None:
                self._commands.put(command)
            return self._down is None

    def _run(self) -> None:
        failed = False
        try:
            while self._obey_commands():
                if self._live:
                    self._step()
        except Exception:
            logger.exception("the engine failed; it takes no more work")
            failed = True
        self._end(failed)

    def _obey_commands(self) -> bool:
        """Carry out what is queued, waiting for a command where nothing runs; false once told to close."""
        while not self._commands.empty() or not self._live:
            command = self._commands.get()
            if isinstance(command, _Close):
                return False
            if isinstance(command, _Add):
                self._add(command)
            elif isinstance(command, _Abort):
                self._abort(command.ids)
            else:
                self._drains.append(command.drained)
            self._note_drained()
        return True

    def _add(self, command: _Add) -> None:
        try:
            self._engine.add(command.requests)
        except SteerserveError as error:
            self._tell(command.subscription, _settle, command.accepted, error)
            return
        except Exception:
            # The request of a failing engine must not wait for ever; `_run` ends the engine.
            self._tell(command.subscription, _settle, command.accepted, EngineDownError("the engine failed"))
            raise
        self._live.update(dict.fromkeys(command.subscription.ids, command.subscription))
        if not self._tell(command.subscription, _settle, command.accepted, None):
            self._abort(command.subscription.ids)

    def _abort(self, ids: Iterable[str]) -> None:
        for request_id in ids:
            if request_id in self._live:
                self._engine.abort(request_id)

    def _step(self) -> None:
        began = time.perf_counter()
        events = self._engine.step()
        self._on_step(time.perf_counter() - began)
        self._deliver(events)
        self._note_drained()

    def _deliver(self, events: Iterable[Event]) -> None:
        batches: dict[Subscription, list[Event]] = {}
        for event in events:
            terminal = isinstance(event, Done | Failed)
            subscription = self._live.pop(event.request_id, None) if terminal else self._live.get(event.request_id)
            if subscription is not None:
                batches.setdefault(subscription, []).append(event)
        for subscription, batch in batches.items():
            if not self._tell(subscription, subscription.put, batch):
                self._abort(subscription.ids)

    def _tell(self, subscription: Subscription, call: Callable[..., None], *arguments: Any) -> bool:
        try:
            subscription.loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            # The loop is closed, and its requests with it.
            return False
        return True

    def _note_drained(self) -> None:
        if not self._live:
            for drained in self._drains:
                drained.set()
            self._drains.clear()

    def _end(self, failed: bool) -> None:
        reason = "the engine failed" if failed else "the server is shutting down"
        with self._gate:
            self._down = reason
        # Nothing is queued from here on.
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                self._tell(command.subscription, _settle, command.accepted, EngineDownError(reason))
            elif isinstance(command, _Drain):
                self._drains.append(command.drained)
        self._deliver([Failed(request_id, reason, aborted=not failed) for request_id in self._live])
        self._note_drained()
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine did not close cleanly")


def _settle(accepted: "asyncio.Future[None]", error: SteerserveError | None) -> None:
    if accepted.done():
        return
    if error is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(error)
