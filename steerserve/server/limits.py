"""The limit on a request's body, held while it streams in."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve.server.errors import BodyTooLargeError, answer_to


class BodyLimit:
    """Refuses bodies over `max_bytes` with 413.

    A declared length is refused before anything is read; a chunked body at the chunk that goes over.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = BodyTooLargeError(f"the body may be {self.max_bytes} bytes at most")
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self.max_bytes):
            await answer_to(error).response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.max_bytes:
                    # The app's own error handler answers: it alone knows whether a response has begun.
                    raise error
            return message

        await self.app(scope, counted, send)
