"""Time in the hands of a test: an engine that waits until it is told to go on, and a loop whose clock jumps."""

import asyncio
import math
import threading

from tests.server.sockets import PATIENCE
from tests.server.text_engine import TextEngine


class Gate:
    """Lets an engine make so many steps, then holds it in the next one until it is let go on."""

    def __init__(self, engine: TextEngine, free_steps: int) -> None:
        self._engine = engine
        self._free_steps: float = free_steps
        self._holds = False
        self._moved = threading.Condition()
        engine.before_step = self._wait

    def wait_held(self) -> None:
        """Wait until the engine is held."""
        with self._moved:
            assert self._moved.wait_for(lambda: self._holds, PATIENCE), "the engine did not get as far as the gate"

    async def held(self) -> None:
        """The same, in a loop."""
        await asyncio.to_thread(self.wait_held)

    def let(self, steps: float) -> None:
        """Let the engine make so many steps more."""
        with self._moved:
            self._free_steps += steps
            self._holds = False
            self._moved.notify_all()

    def open(self) -> None:
        """Let the engine go on for good."""
        self.let(math.inf)

    def _wait(self) -> None:
        with self._moved:
            self._holds = self._engine.steps >= self._free_steps
            self._moved.notify_all()
            assert self._moved.wait_for(lambda: self._engine.steps < self._free_steps, PATIENCE), "nobody opened it"
