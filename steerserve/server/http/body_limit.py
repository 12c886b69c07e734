"""The limits on a request's body, held while it streams in."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve.errors import SteerserveError
from steerserve.server.errors import BodyTimeoutError, BodyTooLargeError, EncodingError, HeadTooLargeError, answer_to
from steerserve.server.telemetry.record import VISIT

MAX_HEAD_BYTES = 32768
"""Largest path, query and headers together; the parser holds no more than about ten times that at once."""


class BodyLimit:
    """Refuses heads over MAX_HEAD_BYTES with 431, bodies over `max_bytes` with 413, compressed ones with 415, and ends
    the wait for one after `seconds` with 408.

    A declared length is refused before anything is read; a chunked body at the chunk that goes over. The connection is
    closed then, which reads and drops some more, so that a client that is still sending gets the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is not None:
            answer = answer_to(refused)
            VISIT.get().reason = answer.code
            await answer.response()(scope, receive, send)
            return
        received, complete = 0, False
        until = asyncio.get_running_loop().time() + self.seconds

        async def counted() -> Message:
            nonlocal received, complete
            message = await receive() if complete else await self._in_time(receive, until)
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > self.max_bytes:
                    # The app's own error handler answers: it alone knows whether a response has begun.
                    raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _refused(self, scope: Scope) -> SteerserveError | None:
        head = len(scope["path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"])
        if head > MAX_HEAD_BYTES:
            return HeadTooLargeError(f"path and headers may be {MAX_HEAD_BYTES} bytes at most, got {head}")
        for name, value in scope["headers"]:
            if name == b"content-encoding" and value.strip().lower() != b"identity":
                return EncodingError("a compressed body is not taken; send it as it is")
            if name == b"content-length" and value.isdigit() and (len(value) > 18 or int(value) > self.max_bytes):
                return self._too_large()
        return None

    async def _in_time(self, receive: Receive, until: float) -> Message:
        try:
            async with asyncio.timeout_at(until):
                return await receive()
        except TimeoutError:
            raise BodyTimeoutError(f"the body did not arrive within {self.seconds:g} s") from None

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body may be {self.max_bytes} bytes at most")
