"""One attempt at a request: it is sent to a server, and what comes back is judged."""

import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from steerserve.errors import SteerserveError

BROKEN: Final = frozenset({408, 500, 502, 504})
"""Statuses of a server, or a proxy before it, that took the request and did not serve it; another attempt may be."""
MAX_TOLD: Final = 500
"""Characters of an answer that is not JSON that its line repeats."""


class RefusedKeyError(SteerserveError):
    """A server does not know the key, and would not know it with any other request."""


@dataclass(frozen=True)
class Answered:
    """The request has its answer."""

    response: dict[str, Any] | None
    error: dict[str, str] | None


@dataclass(frozen=True)
class TurnedAway:
    """The server is there and takes no request for `seconds`: its queue is full, it drains, or a rate is reached."""

    seconds: float


@dataclass(frozen=True)
class Unreached:
    """The request has reached no server."""

    why: str


@dataclass(frozen=True)
class Broken:
    """A server had the request and did not answer it, or with an error that another attempt may not meet.

    The request may be what broke it; `lost` says that the connection ended, so that the server may be gone.
    """

    last: Answered
    """What stands where this was the last attempt."""
    lost: bool


Outcome = Answered | TurnedAway | Unreached | Broken


async def attempt(client: httpx2.AsyncClient, url: str, body: bytes, request_id: str) -> Outcome:
    """Send a request once; raises RefusedKeyError."""
    try:
        answer = await client.post(url, content=body, headers={"x-request-id": request_id})
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        return Unreached(str(error) or type(error).__name__)
    except httpx2.TimeoutException:
        return Broken(Answered(None, {"code": "timeout", "message": "no answer in time"}), lost=False)
    except httpx2.TransportError as error:
        why = f"the connection ended before the answer: {str(error) or type(error).__name__}"
        return Broken(Answered(None, {"code": "connection_lost", "message": why}), lost=True)
    return judged(answer, request_id)


def judged(answer: httpx2.Response, request_id: str) -> Outcome:
    """What an answer means for its request; raises RefusedKeyError."""
    status = answer.status_code
    told = _answered(answer, request_id)
    if status == 401:
        raise RefusedKeyError(f"{answer.url.copy_with(path='/')} refuses the key: {_message(told)}")
    if answer.headers.get("x-should-retry") == "false":
        return told
    if status in (429, 503):
        seconds = retry_after(answer.headers)
        if seconds is not None:
            return TurnedAway(seconds)
        # A proxy that has no server behind it says so without an end.
        return Unreached(f"status {status}: {_message(told)}") if status == 503 else TurnedAway(1.0)
    if status == 404 and _code(told) == "revision_not_served":
        # Of an update that is under way: another server, or the same address a moment later, may have it.
        return Broken(told, lost=False)
    if status in BROKEN or (status < 400 and told.error is not None):
        return Broken(told, lost=False)
    return told


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by `retry-after-ms`, else by `Retry-After`, in seconds or as a date (RFC 9110, section 10.2.3);
    None where neither can be read."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        given = headers.get("retry-after", "")
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return None


def _answered(answer: httpx2.Response, request_id: str) -> Answered:
    """The answer as a line of results has it."""
    told = {"status_code": answer.status_code, "request_id": answer.headers.get("x-request-id", request_id)}
    try:
        body = json.loads(answer.content)
        if isinstance(body, dict):
            return Answered(told | {"body": body}, None)
    except (ValueError, RecursionError):
        pass
    return Answered(
        told | {"body": None},
        {"code": "not_json", "message": f"the answer is no JSON object: {answer.text[:MAX_TOLD]!r}"},
    )


def _code(told: Answered) -> Any:
    """The `code` of an error answer."""
    error = ((told.response or {}).get("body") or {}).get("error")
    return error.get("code") if isinstance(error, dict) else None


def _message(told: Answered) -> str:
    """What an error answer says."""
    if told.error is not None:
        return told.error["message"]
    error = (told.response or {}).get("body", {}).get("error")
    return str(error.get("message", error) if isinstance(error, dict) else error)
