"""Work that stops when its client goes away."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive

Value = TypeVar("Value")


class ClientGoneError(Exception):
    """The client has closed its connection; nobody is left to be answered."""


async def unless_gone(
    receive: Receive, work: Coroutine[Any, Any, Value], undo: Callable[[Value], None] | None = None
) -> Value:
    """The result of `work`, cancelled with ClientGoneError where the client disconnects first.

    The request's body must have been read: only then does `receive` wait for the disconnect. undo: called with a result
    that came too late to be returned, since the caller was cancelled.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    returned = False
    try:
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGoneError
            result = task.result()
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
        returned = True
        return result
    finally:
        if not returned and undo is not None:
            task.add_done_callback(partial(_undo, undo))


def _undo(undo: Callable[[Value], None], task: asyncio.Task[Value]) -> None:
    if not task.cancelled() and task.exception() is None:
        undo(task.result())


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
