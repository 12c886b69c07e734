"""From the engine's thread to whoever waits: answers to commands, and the events of rows, each to its own loop."""

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

from steerserve.engine.api.events import Done, Event, Failed
from steerserve.server.worker.commands import Add, Ask, settle
from steerserve.server.worker.subscription import Subscription


class EventRouter:
    """Who waits for what: commands that are not answered, and rows that have not ended.

    `live` is changed by the engine's thread alone. Where a loop is closed its requests are gone with it, and the
    methods say so.
    """

    def __init__(self) -> None:
        self.live: dict[str, Subscription] = {}
        self._lock = threading.Lock()
        self._pending: set[Add | Ask] = set()

    def expect(self, command: Add | Ask) -> None:
        """Note a command that must be settled; from any thread."""
        with self._lock:
            self._pending.add(command)

    @property
    def pending(self) -> list[Add | Ask]:
        """The commands that have not been settled."""
        with self._lock:
            return list(self._pending)

    def settle(self, command: Add | Ask, error: Exception | None, result: Any = None) -> bool:
        """Tell whoever gave a command what came of it; false where nobody is left."""
        if isinstance(command, Ask):
            told = _call_in_loop(command.loop, settle, command.answer, error, result)
        else:
            told = _call_in_loop(command.subscription.loop, settle, command.accepted, error)
        with self._lock:
            self._pending.discard(command)
        return told

    def send(self, events: Iterable[Event]) -> list[str]:
        """Send the events of live rows, each to its subscription; returns the rows of those that nobody waits for."""
        batches: dict[Subscription, list[Event]] = {}
        ended = []
        for event in events:
            subscription = self.live.get(event.request_id)
            if subscription is None:
                continue
            batches.setdefault(subscription, []).append(event)
            if isinstance(event, Done | Failed):
                ended.append(event.request_id)
        # One call a loop and not one a request: each wakes the loop up, and has this thread give up the interpreter.
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Subscription, list[Event]]]] = {}
        for one, batch in batches.items():
            loops.setdefault(one.loop, []).append((one, batch))
        lost = [one for loop, mail in loops.items() if not _call_in_loop(loop, _put, mail) for one, _ in mail]
        # Last: a row that is dropped before its end has been told would leave its client waiting.
        for request_id in ended:
            self.live.pop(request_id, None)
        return [request_id for one in lost for request_id in one.ids]


def _put(mail: list[tuple[Subscription, list[Event]]]) -> None:
    for subscription, events in mail:
        subscription.put(events)


def _call_in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> bool:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        return False
    return True
