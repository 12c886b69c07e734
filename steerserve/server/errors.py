"""From errors to HTTP: the one place that knows which error is which status."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.responses import JSONResponse

from steerserve.errors import NotFoundError, QueueFullError, RequestError, SteerserveError


class BodyTooLargeError(SteerserveError):
    """The request's body is over the limit."""


class HeadTooLargeError(SteerserveError):
    """The request's line and headers are over the limit."""


class RowFailedError(SteerserveError):
    """A row of the request failed while it ran."""


class UnsteeredError(RowFailedError):
    """A row of the request was to be steered and was not: steering does not take any more."""


class DeletedError(SteerserveError):
    """The generation was deleted while its answer was waited for."""


class RequestTimeoutError(SteerserveError):
    """The request took longer than the server lets one take."""


class BodyTimeoutError(SteerserveError):
    """The request's body did not arrive in time."""


class EncodingError(SteerserveError):
    """The request's body is compressed, which the server does not undo."""


class EngineDownError(SteerserveError):
    """The engine has stopped and takes no work. `retry_after` is in seconds: what a restart took the last time."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDownError(QueueFullError):
    """The server drains; `retry_after` is what is left of it."""


class UnauthorizedError(SteerserveError):
    """No key, or one that is not known. `presented` says whether there was one to look up."""

    def __init__(self, message: str, presented: bool) -> None:
        super().__init__(message)
        self.presented = presented


class PolicyError(RequestError):
    """The caller's key does not allow what the request asks for."""

    code = "policy"


class OverLimitError(SteerserveError):
    """A row went over a limit that its request sets (`param`), and is not to be served then."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class RateLimitError(SteerserveError):
    """The caller is over a limit of its key: `code` says which, `retry_after` is in seconds."""

    def __init__(self, message: str, code: str, retry_after: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


CLOSE: Final = {"connection": "close"}
"""What is left of the body is not waited for."""


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as a client sees it."""

    status: int
    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

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
    if isinstance(error, PolicyError):
        return ErrorAnswer(403, message, "permission_error", error.param, error.code)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, NotFoundError) else 400
        return ErrorAnswer(status, message, "invalid_request_error", error.param, error.code)
    if isinstance(error, BodyTooLargeError):
        return ErrorAnswer(413, message, "invalid_request_error", code="body_too_large", headers=CLOSE)
    if isinstance(error, HeadTooLargeError):
        return ErrorAnswer(431, message, "invalid_request_error", code="headers_too_large")
    if isinstance(error, EncodingError):
        return ErrorAnswer(415, message, "invalid_request_error", "Content-Encoding", "unsupported_encoding")
    if isinstance(error, BodyTimeoutError):
        return ErrorAnswer(408, message, "invalid_request_error", code="body_timeout", headers=CLOSE)
    if isinstance(error, UnauthorizedError):
        challenge = 'Bearer realm="steerserve"' + ', error="invalid_token"' * error.presented
        headers = {"www-authenticate": challenge}
        return ErrorAnswer(401, message, "invalid_request_error", code="invalid_api_key", headers=headers)
    if isinstance(error, RateLimitError):
        return ErrorAnswer(429, message, "rate_limit_error", code=error.code, headers=retry_headers(error.retry_after))
    if isinstance(error, RequestTimeoutError):
        # The next attempt would take as long: the openai client repeats a 5xx unless it is told not to.
        return ErrorAnswer(504, message, code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, ShuttingDownError):
        return ErrorAnswer(503, message, code="shutting_down", headers=retry_headers(error.retry_after))
    if isinstance(error, QueueFullError):
        return ErrorAnswer(503, message, code="overloaded", headers=retry_headers(error.retry_after))
    if isinstance(error, EngineDownError):
        return ErrorAnswer(503, message, code="engine_down", headers=retry_headers(error.retry_after))
    if isinstance(error, DeletedError):
        return ErrorAnswer(410, message, "invalid_request_error", code="deleted")
    if isinstance(error, OverLimitError):
        return ErrorAnswer(422, message, "invalid_request_error", error.param, "limit_exceeded")
    if isinstance(error, UnsteeredError):
        # The next attempt would be no more steered than this one: see the timeout's.
        return ErrorAnswer(500, message, code="steering_not_applied", headers={"x-should-retry": "false"})
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
