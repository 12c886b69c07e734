"""From errors to HTTP: the one place that knows which error is which status."""

import math
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from steerserve.errors import NotFoundError, QueueFullError, RequestError, SteerserveError


class BodyTooLargeError(SteerserveError):
    """The request's body is over the limit."""


class RowFailedError(SteerserveError):
    """A row of the request failed while it ran."""


class EngineDownError(SteerserveError):
    """The engine has stopped and takes no work."""


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as a client sees it."""

    status: int
    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI envelope."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The envelope as a response."""
        return JSONResponse(self.body, self.status, self.headers)


def retry_headers(seconds: float) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least one, and the finer header that the openai client reads first."""
    seconds = min(seconds, 86400.0) if seconds > 0 else 0.0
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(seconds * 1000)))}


def answer_to(error: SteerserveError) -> ErrorAnswer:
    """How an error raised on purpose is answered."""
    message = str(error)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, NotFoundError) else 400
        return ErrorAnswer(status, message, "invalid_request_error", error.param, error.code)
    if isinstance(error, BodyTooLargeError):
        return ErrorAnswer(413, message, "invalid_request_error", code="body_too_large")
    if isinstance(error, QueueFullError):
        return ErrorAnswer(503, message, code="overloaded", headers=retry_headers(error.retry_after))
    if isinstance(error, EngineDownError):
        return ErrorAnswer(503, message, code="engine_down", headers=retry_headers(10.0))
    if isinstance(error, RowFailedError):
        return ErrorAnswer(500, message, code="generation_failed")
    return ErrorAnswer(500, "internal error", code="internal_error")


def unexpected(request_id: str) -> ErrorAnswer:
    """How everything else is answered: nothing but the id under which it was logged."""
    return ErrorAnswer(500, f"internal error; quote request {request_id}", code="internal_error")


def http_error(status: int, method: str, path: str, headers: dict[str, str]) -> ErrorAnswer:
    """How a request that met no route is answered."""
    shown = path if len(path) <= 100 else path[:100] + "..."
    if status == 404:
        message, code = f"no route {method} {shown!r}", "not_found"
    elif status == 405:
        message, code = (
            f"{method} is not allowed on {shown!r}; allowed: {headers.get('allow', '-')}",
            "method_not_allowed",
        )
    else:
        message, code = f"the request was refused with status {status}", "bad_request"
    return ErrorAnswer(status, message, "invalid_request_error", code=code, headers=headers)
