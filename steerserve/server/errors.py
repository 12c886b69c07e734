"""The errors of the server, and how any error is answered."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.responses import JSONResponse

from steerserve.errors import QueueFullError, RequestError, SteerserveError

CLOSE: Final = {"connection": "close"}
"""What is left of the body is not waited for."""
FINAL: Final = {"x-should-retry": "false"}
"""The next attempt would end alike: the openai client repeats a 5xx unless it is told not to."""


class BodyTooLargeError(SteerserveError):
    """The request's body is over the limit."""

    status, type, code, headers = 413, "invalid_request_error", "body_too_large", CLOSE


class HeadTooLargeError(SteerserveError):
    """The request's line and headers are over the limit."""

    status, type, code = 431, "invalid_request_error", "headers_too_large"


class RowFailedError(SteerserveError):
    """A row of the request failed while it ran."""

    code = "generation_failed"


class UnsteeredError(RowFailedError):
    """A row of the request was to be steered and was not: steering does not take any more."""

    code, headers = "steering_not_applied", FINAL


class DeletedError(SteerserveError):
    """The generation was deleted while its answer was waited for."""

    status, type, code = 410, "invalid_request_error", "deleted"


class RequestTimeoutError(SteerserveError):
    """The request took longer than the server lets one take."""

    status, code, headers = 504, "timeout", FINAL


class BodyTimeoutError(SteerserveError):
    """The request's body did not arrive in time."""

    status, type, code, headers = 408, "invalid_request_error", "body_timeout", CLOSE


class EncodingError(SteerserveError):
    """The request's body is compressed, which the server does not undo."""

    status, type, code, param = 415, "invalid_request_error", "unsupported_encoding", "Content-Encoding"


class EngineDownError(SteerserveError):
    """The engine has stopped and takes no work. `retry_after` is what a restart took the last time."""

    status, code = 503, "engine_down"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDownError(QueueFullError):
    """The server drains; `retry_after` is what is left of it."""

    code = "shutting_down"


class UnauthorizedError(SteerserveError):
    """No key, or one that is not known. `presented` says whether there was one to look up."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"

    def __init__(self, message: str, presented: bool) -> None:
        super().__init__(message)
        challenge = 'Bearer realm="steerserve"' + ', error="invalid_token"' * presented
        self.headers = {"www-authenticate": challenge}


class PolicyError(RequestError):
    """The caller's key does not allow what the request asks for."""

    status, type, code = 403, "permission_error", "policy"


class OverLimitError(SteerserveError):
    """A row went over a limit that its request sets (`param`), and is not to be served then."""

    status, type, code = 422, "invalid_request_error", "limit_exceeded"

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class RateLimitError(SteerserveError):
    """The caller is over a limit of its key: `code` says which."""

    status, type = 429, "rate_limit_error"

    def __init__(self, message: str, code: str, retry_after: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class ReplicaUnreachableError(SteerserveError):
    """The replica that runs the generation does not answer."""

    status, code = 502, "replica_unreachable"


class ForwardRefusedError(SteerserveError):
    """A request says that a replica of the fleet has forwarded it, and none has."""

    status, type, code = 403, "permission_error", "forward_refused"


class LimitsStoreError(SteerserveError):
    """The store that counts the limits of keys over a fleet does not answer, and no request is served without it."""

    status, code = 503, "limits_store_down"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


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
    """Answer an error that was raised on purpose as its class says."""
    message = "internal error" if error.code == SteerserveError.code else str(error)
    again = {} if error.retry_after is None else retry_headers(error.retry_after)
    return ErrorAnswer(error.status, message, error.type, error.param, error.code, {**error.headers, **again})


def unexpected(request_id: str) -> ErrorAnswer:
    """Answer any other error with nothing but the id under which it was logged."""
    return ErrorAnswer(500, f"internal error; quote request {request_id}", code="internal_error")


def http_error(status: int, method: str, path: str, headers: dict[str, str]) -> ErrorAnswer:
    """Answer a request that met no route."""
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
