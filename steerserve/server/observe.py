"""The outermost layer of the app: request ids, the count and time of requests, and what nobody else caught."""

import logging
import re
import time
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve.server.disconnect import ClientGoneError
from steerserve.server.errors import unexpected
from steerserve.server.metrics import Metrics

logger = logging.getLogger(__name__)

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Observe:
    """Gives each request an id, echoes it as `x-request-id`, and counts the request when it has ended.

    Leaves `request_id` in the request's state and honours an `outcome` left there by a stream.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        began = time.perf_counter()
        try:
            await self.app(scope, receive, stamped)
        except (ClientDisconnect, ClientGoneError):
            state["outcome"] = "disconnected"
        except Exception:
            logger.exception("request %s failed", request_id)
            state["outcome"] = "failed"
            if not status:
                await unexpected(request_id).response()(scope, receive, stamped)
        # A route's template, not its path: paths are the client's to choose, and each would be a series.
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, state.get("outcome") or _outcome(status)).inc()
        self.metrics.request_seconds.labels(route).observe(time.perf_counter() - began)


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode("ascii") if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _outcome(status: int) -> str:
    if status == 503:
        return "refused"
    if status >= 500:
        return "failed"
    return "invalid" if status >= 400 else "ok"
