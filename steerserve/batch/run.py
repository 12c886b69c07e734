"""A batch while it runs: which request goes where when, until each has its line."""

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from steerserve.batch.attempts import Answered, Broken, TurnedAway, attempt
from steerserve.batch.requests import BatchRequest
from steerserve.batch.results import BatchResult, ResultFile
from steerserve.batch.servers import Server, with_room
from steerserve.errors import SteerserveError

CONNECT_SECONDS = 10.0


class NoServerError(SteerserveError):
    """No server has answered for longer than was to be waited."""


@dataclass(frozen=True)
class BatchConfig:
    """Where a batch is sent, and how hard it tries."""

    url: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """Address of a server, with or without /v1; may be repeated: a request goes to the one that has the fewest."""
    key_file: Path | None = None
    """File that holds the API key; unset: the environment variable STEERSERVE_API_KEY, if it is there."""
    concurrency: int = 32
    """Requests that a server has at once, at most."""
    retries: int = 5
    """How often a request is sent again after a server took it and gave no answer or a 5xx. To be turned away, or to
    find no server, does not count."""
    timeout: float = 900.0
    """Seconds that an answer may take."""
    patience: float = 600.0
    """Seconds without any server that answers, after which the command ends."""

    def __post_init__(self) -> None:
        for url in self.url:
            if not httpx2.URL(url).host or not url.startswith(("http://", "https://")):
                raise ValueError(f"url must be such as http://127.0.0.1:8000, got {url!r}")
        if len({base(url) for url in self.url}) < len(self.url):
            raise ValueError(f"url must not name one server twice, got {' '.join(self.url)}")
        for name, least in {"concurrency": 1, "retries": 0, "timeout": 0.01, "patience": 0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")


def base(url: str) -> str:
    """The address of a server without the version that the paths of requests have."""
    return url.rstrip("/").removesuffix("/v1")


@dataclass(eq=False)
class Pending:
    """A request that has no line yet."""

    request: BatchRequest
    id: str = field(default_factory=lambda: f"batch_req_{uuid.uuid4().hex}")
    failures: int = 0
    last: Server | None = None
    """The server that it failed at last."""


class BatchRun:
    """Sends the requests of a batch that have no line yet, as many at once as the servers take, and writes a line for
    each as it is answered.

    A request that fails goes to the end of the line, and to another server where there is one; one that was turned away
    stays in front. Raises NoServerError, RefusedKeyError, and ArtifactError where lines cannot be written.
    """

    def __init__(
        self,
        requests: Sequence[BatchRequest],
        results: ResultFile,
        config: BatchConfig,
        key: str | None = None,
        on_result: Callable[[BatchResult], None] = lambda result: None,  # noqa: ARG005
        say: Callable[[str], None] = lambda line: None,  # noqa: ARG005
    ) -> None:
        """on_result: told of each line that was written; say: told of servers that are lost and found."""
        self.sent_again = 0
        """Attempts beyond the first of each request."""
        self._results = results
        self._config = config
        self._key = key
        self._on_result = on_result
        self._say = say
        self._pending = deque(Pending(one) for one in requests if one.custom_id not in results.results)
        self._servers = [Server(base(url), config.concurrency, config.concurrency) for url in config.url]
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Go on until every request has a line."""
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        timeout = httpx2.Timeout(self._config.timeout, connect=CONNECT_SECONDS, pool=None)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            async with (
                httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits) as client,
                asyncio.TaskGroup() as group,
            ):
                await self._dispatch(client, group)
        except BaseExceptionGroup as errors:
            # One that ended the run; the others came of its end.
            raise errors.exceptions[0] from None

    async def _dispatch(self, client: httpx2.AsyncClient, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while self._pending or any(one.running for one in self._servers):
            now = loop.time()
            self._changed.clear()
            server = with_room(self._servers, now, self._pending[0].last) if self._pending else None
            if server is not None:
                server.running += 1
                group.create_task(self._ask(client, self._pending.popleft(), server))
                continue
            self._check_patience(now)
            pauses = [one.not_before for one in self._servers if one.not_before > now] if self._pending else []
            try:
                async with asyncio.timeout_at(min(pauses, default=None)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _ask(self, client: httpx2.AsyncClient, one: Pending, server: Server) -> None:
        try:
            body = json.dumps(one.request.body).encode()
            outcome = await attempt(client, server.url + one.request.url, body, one.id)
        finally:
            server.running -= 1
            self._changed.set()
        now = asyncio.get_running_loop().time()
        if server.silent_since is not None and isinstance(outcome, Answered | TurnedAway):
            self._say(f"{server.url} answers again")
        if isinstance(outcome, Answered):
            server.answered()
            self._note(one, outcome)
        elif isinstance(outcome, TurnedAway):
            server.turned_away(now, outcome.seconds)
            self._again(one, front=True)
        elif isinstance(outcome, Broken):
            if outcome.lost and server.failed(now):
                self._say(f"{server.url}: {(outcome.last.error or {}).get('message')}")
            one.failures, one.last = one.failures + 1, server
            if one.failures > self._config.retries:
                self._note(one, outcome.last)
            else:
                self._again(one, front=False)
        else:
            if server.failed(now):
                self._say(f"{server.url}: {outcome.why}")
            self._again(one, front=True)

    def _again(self, one: Pending, front: bool) -> None:
        self.sent_again += 1
        (self._pending.appendleft if front else self._pending.append)(one)

    def _note(self, one: Pending, answer: Answered) -> None:
        result = BatchResult(one.id, one.request.custom_id, answer.response, answer.error)
        self._results.write(result)
        self._on_result(result)

    def _check_patience(self, now: float) -> None:
        """Raise NoServerError where nothing runs and every server has been silent for too long."""
        since = [one.silent_since for one in self._servers]
        silent = [now - one for one in since if one is not None]
        if len(silent) < len(since) or any(one.running for one in self._servers):
            return
        if min(silent) >= self._config.patience:
            left = len(self._pending)
            raise NoServerError(
                f"no server has answered for {min(silent):.0f} s; {left} requests are left: run it again to go on"
            )
