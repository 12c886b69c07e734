"""Errors as clients see them: what each class says of itself is what is answered."""

import pytest

from steerserve import errors
from steerserve.errors import SteerserveError
from steerserve.server import errors as served
from steerserve.server.errors import answer_to

ANSWERS = [
    (SteerserveError("m"), 500, "server_error", None, "internal_error"),
    (errors.ArtifactError("m"), 500, "server_error", None, "internal_error"),
    (errors.RequestError("m", "n"), 400, "invalid_request_error", "n", "invalid_value"),
    (errors.TooLongError("m", "n", 3), 400, "invalid_request_error", "n", "invalid_value"),
    (errors.NotFoundError("m", "n"), 404, "invalid_request_error", "n", "not_found"),
    (errors.QueueFullError("m", 2.5), 503, "server_error", None, "overloaded"),
    (served.ShuttingDownError("m", 2.5), 503, "server_error", None, "shutting_down"),
    (served.EngineDownError("m", 2.5), 503, "server_error", None, "engine_down"),
    (served.BodyTooLargeError("m"), 413, "invalid_request_error", None, "body_too_large"),
    (served.HeadTooLargeError("m"), 431, "invalid_request_error", None, "headers_too_large"),
    (served.BodyTimeoutError("m"), 408, "invalid_request_error", None, "body_timeout"),
    (served.EncodingError("m"), 415, "invalid_request_error", "Content-Encoding", "unsupported_encoding"),
    (served.DeletedError("m"), 410, "invalid_request_error", None, "deleted"),
    (served.OverLimitError("m", "n"), 422, "invalid_request_error", "n", "limit_exceeded"),
    (served.PolicyError("m", "n"), 403, "permission_error", "n", "policy"),
    (served.UnauthorizedError("m", presented=True), 401, "invalid_request_error", None, "invalid_api_key"),
    (served.RateLimitError("m", "rate", 2.5), 429, "rate_limit_error", None, "rate"),
    (served.RequestTimeoutError("m"), 504, "server_error", None, "timeout"),
    (served.RowFailedError("m"), 500, "server_error", None, "generation_failed"),
    (served.UnsteeredError("m"), 500, "server_error", None, "steering_not_applied"),
]


@pytest.mark.parametrize(("error", "status", "kind", "param", "code"), ANSWERS)
def test_an_error_is_answered_as_its_class_says(
    error: SteerserveError, status: int, kind: str, param: str | None, code: str
) -> None:
    answer = answer_to(error)
    assert (answer.status, answer.type, answer.param, answer.code) == (status, kind, param, code)
    # What nobody foresaw is not told to clients.
    assert answer.message == ("internal error" if code == "internal_error" else "m")
    assert answer.headers.get("retry-after") == ("3" if error.retry_after else None)


def test_headers_tell_clients_what_to_do_next() -> None:
    assert answer_to(served.BodyTooLargeError("m")).headers == {"connection": "close"}
    assert answer_to(served.UnsteeredError("m")).headers == {"x-should-retry": "false"}
    challenge = answer_to(served.UnauthorizedError("m", presented=False)).headers["www-authenticate"]
    assert challenge == 'Bearer realm="steerserve"'
    assert answer_to(errors.QueueFullError("m", 0.2)).headers == {"retry-after": "1", "retry-after-ms": "200"}
