"""Commands from the asyncio side to the engine's thread."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steerserve.engine.api.base import Engine
from steerserve.server.worker.subscription import Subscription


@dataclass(frozen=True, eq=False)
class Add:
    """Queue these rows; `accepted` is settled, in the subscription's loop, once that has been done or refused."""

    requests: list[Any]
    subscription: Subscription
    accepted: "asyncio.Future[None]"


@dataclass(frozen=True)
class Abort:
    """Free these rows before the next step."""

    ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Ask:
    """Call `work` with the engine, between two steps; `answer` is settled, in `loop`, with what comes of it."""

    work: Callable[[Engine], Any]
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[Any]"


@dataclass(frozen=True)
class Drain:
    """Set `drained` when nothing runs."""

    drained: threading.Event


@dataclass(frozen=True)
class Close:
    """End, before the next step."""


Command = Add | Abort | Ask | Drain | Close


def settle(waiting: "asyncio.Future[Any]", error: Exception | None, result: Any = None) -> None:
    """Tell a waiting caller, in its loop, what came of its command or why nothing did."""
    if waiting.done():
        return
    if error is None:
        waiting.set_result(result)
    else:
        waiting.set_exception(error)
