"""The longest a request may take: what still runs then is freed, and the client is told."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve.server.errors import ErrorAnswer, RequestTimeoutError, answer_to
from steerserve.server.protocol.encoding import data
from steerserve.server.telemetry.record import VISIT

LAST_WORDS = 1.0
"""Seconds that a client may take to accept the frame that ends its stream."""


class Deadline:
    """Cancels the app after `seconds` and answers 504 or, where a stream has begun, with an error event."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = ended = False

        async def watched(message: Message) -> None:
            nonlocal begun, ended
            begun = True
            ended = ended or message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            async with asyncio.timeout(self.seconds) as limit:
                await self.app(scope, receive, watched)
        except TimeoutError:
            if not limit.expired():
                raise
            visit, answer = VISIT.get(), answer_to(RequestTimeoutError(f"took longer than {self.seconds:g} s"))
            visit.outcome, visit.reason = "timeout", answer.code
            if not begun:
                await answer.response()(scope, receive, send)
            elif not ended:
                await _end_stream(answer, send)


async def _end_stream(answer: ErrorAnswer, send: Send) -> None:
    message = {"type": "http.response.body", "body": data(answer.body), "more_body": False}
    try:
        async with asyncio.timeout(LAST_WORDS):
            await send(message)
    except TimeoutError:
        # A client that does not read; the server closes the connection of an answer that was not completed.
        return
