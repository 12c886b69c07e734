"""The limits of keys over a fleet, counted in Redis or Valkey."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from limits.aio.storage import RedisStorage

from steerserve.errors import SteerserveError
from steerserve.extras import install_command
from steerserve.server.auth.window import wait_for_place
from steerserve.server.errors import LimitsStoreError
from steerserve.server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

PREFIX: Final = "steerserve"
CALL_SECONDS: Final = 0.5
"""How long the store may take to answer; then it counts as away."""
CONNECTIONS: Final = 16
LEASE_SECONDS: Final = 30
"""How long a request counts as running after its server was last heard of."""
WATCH_SECONDS: Final = 1.0
"""How often leases are renewed, and a store that is away is asked whether it is back."""

# The store's own clock decides, so that those of the servers may differ.
LEASE: Final = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
"""
RENEW: Final = """
local now = redis.call('TIME')
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now[1] + now[2] / 1000000 + ARGV[1], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""


class LimitsStore:
    """Places in a key's minute, and leases of requests that run. A server that dies stops renewing its leases.

    Every method but `release` raises LimitsStoreError while the store is away. The first call that fails says so, in
    the log and the metrics; after that, calls fail at once and `watched` alone asks whether it is back.
    """

    def __init__(self, url: str, metrics: Metrics) -> None:
        """url: redis://, rediss:// or unix://; raises SteerserveError without the extra `fleet`."""
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ModuleNotFoundError as error:
            raise SteerserveError(f"--limits-store needs {error.name}: {install_command('fleet')}") from error
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=CALL_SECONDS,
                socket_timeout=CALL_SECONDS,
                socket_connect_timeout=CALL_SECONDS,
                # Once more, since a connection that was kept may have been closed.
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            # Not what is wrong with it: that may be a piece of a password.
            raise SteerserveError("--limits-store is not a URL of a Redis, such as redis://host:6379/0") from error
        self._redis = Redis(connection_pool=pool)
        options: dict[str, Any] = {"connection_pool": pool}
        self._window = RedisStorage(url, implementation="redispy", key_prefix=PREFIX, **options)
        self._lease, self._renew = self._redis.register_script(LEASE), self._redis.register_script(RENEW)
        self._errors: tuple[type[Exception], ...] = (RedisError, OSError)
        self._metrics = metrics
        self._away = False
        self._held: defaultdict[str, set[str]] = defaultdict(set)
        metrics.gauge("limits_store_up", "1 while the store of limits answers", lambda: float(not self._away))

    async def wait_for_place(self, name: str, rate: int) -> float | None:
        """Take a place in a key's minute; None, or the seconds until there is one."""
        wait: float | None = await self._call(lambda: wait_for_place(self._window, name, rate))
        return wait

    async def lease(self, name: str, ticket: str, most: int) -> bool:
        """Count one more that runs, until it is released; false where `most` do.

        What could not be counted, since the store was away, is told to it once it is back.
        """
        taken = True
        try:
            taken = bool(await self._call(lambda: self._lease([_key(name)], [most, LEASE_SECONDS, ticket])))
        finally:
            if taken:
                self._held[name].add(ticket)
        return taken

    async def release(self, name: str, ticket: str) -> None:
        """Count it no more; where the store is away, its lease runs out."""
        self._held[name].discard(ticket)
        if not self._held[name]:
            del self._held[name]
        try:
            await self._call(lambda: self._redis.zrem(_key(name), ticket))
        except LimitsStoreError:
            return  # said when it went away

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Renew leases meanwhile, and ask for a store that is away."""
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await self._redis.aclose()
            await self._redis.connection_pool.disconnect()

    async def _watch(self) -> None:
        while True:
            try:
                await self._ask(lambda: self._redis.ping())
                for name in list(self._held):
                    await self._renewed(name)
                if self._away:
                    self._away = False
                    logger.warning("the store of limits is back: limits hold over the fleet again")
            except LimitsStoreError:
                pass  # said when it went away
            await asyncio.sleep(WATCH_SECONDS)

    async def _renewed(self, name: str) -> None:
        tickets = set(self._held[name])
        await self._ask(lambda: self._renew([_key(name)], [LEASE_SECONDS, *tickets]))
        # What was released meanwhile may have been written again.
        if ended := tickets - self._held.get(name, set()):
            await self._ask(lambda: self._redis.zrem(_key(name), *ended))

    async def _call(self, call: Callable[[], Any]) -> Any:
        if self._away:
            raise LimitsStoreError("the store of limits is away", WATCH_SECONDS)
        return await self._ask(call)

    async def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return await call()
        except self._errors as error:
            self._metrics.limits_store_failures.inc()
            if not self._away:
                self._away = True
                logger.error("the store of limits is away: %s: %s", type(error).__name__, error)
            raise LimitsStoreError("the store of limits is away", WATCH_SECONDS) from error


def _key(lease: str) -> str:
    return f"{PREFIX}:running/{lease}"
