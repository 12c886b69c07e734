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
from typing import Any

from steerserve.engine.api.base import Engine
from steerserve.engine.api.events import Failed
from steerserve.errors import SteerserveError
from steerserve.server.errors import EngineDownError
from steerserve.server.telemetry.record import CURRENT_RECORD
from steerserve.server.worker.commands import Abort, Add, Ask, Close, Command, Drain
from steerserve.server.worker.event_router import EventRouter
from steerserve.server.worker.intake import Intake
from steerserve.server.worker.load import Load
from steerserve.server.worker.subscription import Subscription

logger = logging.getLogger(__name__)

LAST_STEP_SECONDS = 10.0
"""How long the engine's thread may take to end once it has been told to; it ends between two steps."""


class EngineWorker:
    """Runs an engine in a thread of its own: `submit` and `abort` from any loop, the rest from anywhere."""

    def __init__(
        self, engine: Engine, load: Load, max_queue_steps: int | None = None, restart_seconds: float = 1.0
    ) -> None:
        """max_queue_steps: canvas-steps that may wait; restart_seconds: how long a new server takes to be ready."""
        self.load = load
        self.intake = Intake(restart_seconds)
        self._engine = engine
        self._max_queue_steps = max_queue_steps
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._delivery = EventRouter()
        # The thread's own, but for the time of the step, which others read.
        self._drains: list[threading.Event] = []
        self._step_began: float | None = None

    @property
    def step_seconds(self) -> float:
        """Seconds that the step being made has lasted; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.perf_counter() - began

    def start(self) -> None:
        """Start the thread; once."""
        self.intake.open()
        self._thread.start()

    def check_room(self) -> None:
        """Raise QueueFullError, EngineDownError or ShuttingDownError where even the smallest request would be refused;
        from any thread."""
        with self.intake.lock:
            self.intake.check()
            self.load.check_full(self.intake.arriving, self._max_queue_steps)

    async def submit(self, requests: list[Any]) -> Subscription:
        """Add admitted requests, all or none; raises QueueFullError or EngineDownError.

        Every request of the subscription gets exactly one Done or Failed.
        """
        visit = CURRENT_RECORD.get(None)
        subscription = Subscription(requests, visit.steering if visit is not None else None)
        command = Add(requests, subscription, subscription.loop.create_future())
        with self.intake.lock:
            self.intake.check()
            self._delivery.expect(command)
            self._commands.put(command)
            self.intake.arriving += len(requests)
        try:
            await command.accepted
        except asyncio.CancelledError:
            self.abort(subscription.ids)
            raise
        return subscription

    def abort(self, ids: Iterable[str]) -> None:
        """Free these rows before the next step; ids that have finished are ignored."""
        self._command(Abort(tuple(ids)))

    async def ask(self, work: Callable[[Engine], Any]) -> Any:
        """Return what `work` returns, or raise what it raises, when it is called with the engine in its thread, between
        two steps; raises EngineDownError."""
        loop = asyncio.get_running_loop()
        command = Ask(work, loop, loop.create_future())
        with self.intake.lock:
            self.intake.check_up()
            self._delivery.expect(command)
            self._commands.put(command)
        return await command.answer

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones; false where `timeout` seconds did not suffice."""
        drained = threading.Event()
        self.intake.drain(timeout)
        return not self._command(Drain(drained)) or drained.wait(timeout)

    def stop(self) -> None:
        """Have the engine closed before its next step; what still runs ends in Failed. Does not wait."""
        self._command(Close())

    def close(self) -> None:
        """Close the engine, and wait for its thread; one that hangs in a step is left behind, and counts as failed."""
        self.stop()
        if self._thread.ident is None:
            return
        self._thread.join(LAST_STEP_SECONDS)
        if self._thread.is_alive():
            self._answer_all("the engine hangs", failed=True)
            self._commands.put(Close())

    def _command(self, command: Command) -> bool:
        with self.intake.lock:
            if self.intake.down is None:
                self._commands.put(command)
            return self.intake.down is None

    def _run(self) -> None:
        failed = True
        try:
            while self._obey_commands():
                if self._delivery.live:
                    self._step()
            failed = False
        except Exception:
            logger.exception("the engine failed; it takes no more work")
        finally:
            # Also where something has ended the thread that is no error of the engine's, as SystemExit does.
            self._end(failed)

    def _obey_commands(self) -> bool:
        """Carry out what is queued, waiting for a command where nothing runs; false once told to close."""
        while not self._commands.empty() or not self._delivery.live:
            command = self._commands.get()
            if isinstance(command, Close):
                return False
            if isinstance(command, Add):
                self._add(command)
            elif isinstance(command, Abort):
                self._abort(command.ids)
            elif isinstance(command, Ask):
                self._work(command)
            else:
                self._drains.append(command.drained)
            self._note_drained()
        return True

    def _add(self, command: Add) -> None:
        try:
            with self.intake.lock:
                self.intake.arriving -= len(command.requests)
                self.load.check_room(command.requests, self._max_queue_steps)
                self._engine.add(command.requests)
        except SteerserveError as error:
            self._delivery.settle(command, error)
            return
        self._delivery.live.update(dict.fromkeys(command.subscription.ids, command.subscription))
        self.load.added(command.subscription, command.requests)
        if not self._delivery.settle(command, None):
            self._abort(command.subscription.ids)

    def _work(self, command: Ask) -> None:
        self._step_began = time.perf_counter()
        try:
            result = None if command.answer.done() else command.work(self._engine)
        except Exception as error:  # it is the caller's, whatever it is
            self._delivery.settle(command, error)
        else:
            self._delivery.settle(command, None, result)
        finally:
            self._step_began = None

    def _abort(self, ids: Iterable[str]) -> None:
        for request_id in ids:
            if request_id in self._delivery.live:
                self._engine.abort(request_id)

    def _step(self) -> None:
        began = self._step_began = time.perf_counter()
        events = self._engine.step()
        self._step_began = None
        self.load.stepped(began, events)
        self._abort(self._delivery.send(events))
        self._note_drained()

    def _note_drained(self) -> None:
        if not self._delivery.live:
            for drained in self._drains:
                drained.set()
            self._drains.clear()

    def _end(self, failed: bool) -> None:
        self._step_began = None
        self._answer_all("the engine failed" if failed else "the server is shutting down", failed)
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine did not close cleanly")

    def _answer_all(self, reason: str, failed: bool) -> None:
        """Take no more work, and end all there is."""
        self.intake.shut(reason, failed)
        # Nothing is noted from here on.
        if failed:
            logger.critical("the engine's thread has ended: %s", reason)
        for command in self._delivery.pending:
            self._delivery.settle(command, EngineDownError(reason, self.intake.restart_seconds))
        while not self._commands.empty():
            queued = self._commands.get()
            if isinstance(queued, Drain):
                self._drains.append(queued.drained)
        ended = list(self._delivery.live)
        for request_id in ended:
            self.load.remove(request_id)
        self._delivery.send([Failed(request_id, reason, aborted=not failed) for request_id in ended])
        self._note_drained()
