"""The client of the other replicas: sends what concerns a generation to the one that runs it."""

import asyncio
import json
from collections.abc import Sequence
from typing import Final

import httpx2
from starlette.responses import Response

from steerserve.server.errors import ReplicaUnreachableError
from steerserve.server.fleet.generation_ids import GenerationIds
from steerserve.server.fleet.signatures import HEADER, Signatures
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.telemetry.record import CURRENT_RECORD

CONNECTIONS: Final = 64
KEPT_CONNECTIONS: Final = 16
KEPT_SECONDS: Final = 2.0
"""How long a connection is kept that is not used: less than the other side keeps it."""
CONNECT_SECONDS: Final = 2.0
RELAYED: Final = ("content-type", "retry-after", "retry-after-ms", "x-should-retry")
"""Headers of the other replica's answer that the caller gets too."""


class Forwarder:
    """Forwards once: what has been forwarded is answered where it arrives, whatever its id says."""

    def __init__(
        self, secrets: Sequence[bytes], address: str, ids: GenerationIds, seconds: float, metrics: Metrics
    ) -> None:
        """address: this replica's; seconds: how long another one may take."""
        self._address = address
        self._ids = ids
        self._seconds = seconds
        self._signatures = Signatures(secrets, address)
        self._metrics = metrics
        self._failures = (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError)
        # Proxies of the environment are for what is outside.
        self._client = httpx2.AsyncClient(
            trust_env=False,
            limits=httpx2.Limits(
                max_connections=CONNECTIONS,
                max_keepalive_connections=KEPT_CONNECTIONS,
                keepalive_expiry=KEPT_SECONDS,
            ),
            timeout=httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
        )

    def other(self, name: str) -> str | None:
        """The address of the replica that runs, or ran, this generation; None where it is this one, or none."""
        address = self._ids.address_in(name)
        return None if address == self._address else address

    async def send(self, address: str, method: str, path: str, body: bytes) -> Response:
        """The answer of another replica, for the caller of the request being served, with its id and trace.

        Raises ReplicaUnreachableError where none comes in time, or what answers is no replica of this fleet.
        """
        visit = CURRENT_RECORD.get()
        visit.forwarded_to = address
        signed = self._signatures.sign(method, path, visit.key_sha256)
        headers = {HEADER: signed, "x-request-id": visit.id, "traceparent": visit.trace.traceparent}
        if visit.trace.state is not None:
            headers["tracestate"] = visit.trace.state
        if body:
            headers["content-type"] = "application/json"
        try:
            async with (
                asyncio.timeout(self._seconds),
                self._client.stream(method, f"http://{address}{path}", content=body, headers=headers) as answer,
            ):
                # Before its body is read: what has no proof may send one without end.
                if not self._signatures.proves(signed, answer.headers.get(HEADER)):
                    raise self._unreachable(f"status {answer.status_code} without its proof")
                await answer.aread()
        except self._failures as error:
            raise self._unreachable(type(error).__name__) from error
        self._metrics.forwards.labels("answered").inc()
        if answer.status_code >= 400:
            visit.reason = json.loads(answer.content)["error"]["code"]
        relayed = {one: answer.headers[one] for one in RELAYED if one in answer.headers}
        return Response(answer.content, answer.status_code, relayed)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _unreachable(self, why: str) -> ReplicaUnreachableError:
        self._metrics.forwards.labels("unreachable").inc()
        return ReplicaUnreachableError(
            f"the replica that runs this generation gave no answer that can be passed on ({why})"
        )
