"""Every error steerserve raises on purpose, in one tree; each says how the server answers it.

SteerserveError
├── RequestError        the caller asked for something wrong (400)
│   ├── NotFoundError   it names something that does not exist (404)
│   │   └── RevisionError  it names a revision of something that is there in another one (404)
│   └── TooLongError    its response does not fit on a canvas; a shorter one would
├── QueueFullError      no room for the request now (503 with Retry-After)
└── ArtifactError       a model, SAE or attribute on disk is not what it claims to be (start-up, exit code 2)
    └── SelfTestError   steering does not take on the model that would serve
"""

from collections.abc import Mapping
from types import MappingProxyType


class SteerserveError(Exception):
    """Base of every error raised on purpose, with how the server answers it."""

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"
    """An error that keeps this code is answered without its message."""
    param: str | None = None
    """Path of the request's field that is to blame."""
    retry_after: float | None = None
    """Seconds after which to try again."""
    headers: Mapping[str, str] = MappingProxyType({})
    """Headers of the answer beside those of `retry_after`."""


class RequestError(SteerserveError):
    """A request that cannot be honoured. `param` is the path of the offending field, if one is to blame."""

    status, type, code = 400, "invalid_request_error", "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFoundError(RequestError):
    """A request that names a model, attribute, SAE or generation that does not exist."""

    status, code = 404, "not_found"


class RevisionError(NotFoundError):
    """A request that names a revision of something that is here in another one; another replica may have it."""

    code = "revision_not_served"


class TooLongError(RequestError):
    """A response that is too long for a canvas. `fits` is the length that is not: 1 or more."""

    def __init__(self, message: str, param: str | None = None, fits: int = 1) -> None:
        super().__init__(message, param)
        self.fits = fits


class QueueFullError(SteerserveError):
    """The queue is at its limit, or the server drains."""

    status, code = 503, "overloaded"
    retry_after: float

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ArtifactError(SteerserveError):
    """A folder on disk cannot be loaded as what it is said to be."""


class SelfTestError(ArtifactError):
    """A known push did not move the logits: nothing may be served."""
