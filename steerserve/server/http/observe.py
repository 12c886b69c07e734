"""The outermost layer of the app: request ids, what is reported of a request, and what nobody else caught."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve.server.errors import unexpected
from steerserve.server.http.disconnect import ClientGoneError
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.telemetry.record import CODES, CURRENT_RECORD, RequestRecord
from steerserve.server.telemetry.trace_context import continued

logger = logging.getLogger(__name__)

Report = Callable[[RequestRecord], None]
"""Told of every request that has ended."""

TURNED_AWAY = frozenset({401, 403, 408, 413, 415, 429, 431, 503})

LONGEST_CONTEXT = 512
"""Characters of a header of the trace context; a longer one is left out."""

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Observe:
    """Gives each request an id, echoes it as `x-request-id`, and reports the request when it has ended.

    Leaves `request_id` and the RequestRecord in the request's state, and honours what a stream leaves there: an
    `outcome`, and the status that the error which `ended` it would have had.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, reports: Sequence[Report] = ()) -> None:
        self.app = app
        self.metrics = metrics
        self.reports = reports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = continued(_header(scope, b"traceparent"), _header(scope, b"tracestate"))
        visit = RequestRecord(_request_id(scope), scope["method"], trace=trace)
        state = scope.setdefault("state", {})
        state["request_id"], state["visit"] = visit.id, visit
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", visit.id.encode())]
            await send(message)

        token = CURRENT_RECORD.set(visit)
        try:
            await self.app(scope, receive, stamped)
        except (ClientDisconnect, ClientGoneError):
            state["outcome"] = "disconnected"
        except Exception:
            logger.exception("request %s failed", visit.id)
            state["outcome"] = "failed"
            if not status:
                await unexpected(visit.id).response()(scope, receive, stamped)
        finally:
            CURRENT_RECORD.reset(token)
            # A route's template, not its path: paths are the client's to choose, and each would be a series.
            visit.route = getattr(scope.get("route"), "path", "other")
            status = state.get("ended", status)
            visit.outcome = visit.outcome or state.get("outcome") or _outcome(status)
            visit.code = CODES[visit.outcome] if visit.outcome in CODES and status < 400 else status
            visit.seconds = time.perf_counter() - visit.began
            self._report(visit)

    def _report(self, visit: RequestRecord) -> None:
        self.metrics.requests.labels(visit.route, visit.code).inc()
        self.metrics.request_seconds.labels(visit.route).observe(visit.seconds)
        if visit.code in TURNED_AWAY and visit.reason is not None:
            self.metrics.rejected.labels(visit.reason).inc()
        for report in self.reports:
            report(visit)


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _SAFE_ID.fullmatch(given[0]):
        return str(given[0].decode("ascii"))
    return f"req-{uuid.uuid4().hex}"


def _header(scope: Scope, wanted: bytes) -> str | None:
    given = [value for name, value in scope["headers"] if name == wanted]
    return given[0].decode("latin-1") if len(given) == 1 and len(given[0]) <= LONGEST_CONTEXT else None


def _outcome(status: int) -> str:
    if status in (0, 503):
        return "refused" if status else "disconnected"
    if status >= 500:
        return "failed"
    return "invalid" if status >= 400 else "ok"
