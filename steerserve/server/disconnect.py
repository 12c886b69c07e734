"""Work that stops when its client goes away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

Value = TypeVar("Value")


class ClientGoneError(Exception):
    """The client has closed its connection; nobody is left to be answered."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`, cancelled with ClientGoneError where the client disconnects first.

    The request's body must have been read: only then does `receive` wait for the disconnect.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
