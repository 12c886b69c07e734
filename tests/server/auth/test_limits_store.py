"""Limits of keys over several servers, with a real Redis."""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from steerserve.config import ServerConfig
from steerserve.errors import SteerserveError
from steerserve.server.auth import limits_store
from steerserve.server.auth.limits_store import LimitsStore
from steerserve.server.auth.rate import Rates
from steerserve.server.errors import LimitsStoreError, RateLimitError
from steerserve.server.telemetry.metrics import Metrics
from tests.server.asgi import Call, running
from tests.server.auth.test_rate import key, many, one
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.redis_server import RedisServer, needs_redis, redis_server
from tests.server.sockets import PATIENCE
from tests.server.text_engine import TextEngine


@dataclass
class Replica:
    """The limits of one server."""

    rates: Rates
    store: LimitsStore
    metrics: Metrics

    @property
    def up(self) -> float | None:
        return self.metrics.registry.get_sample_value("steerserve_limits_store_up")


@asynccontextmanager
async def replica(url: str, closed: bool = False) -> AsyncIterator[Replica]:
    metrics = Metrics()
    store = LimitsStore(url, metrics)
    async with store.watched():
        yield Replica(Rates(store, closed), store, metrics)


async def holds(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


@needs_redis
def test_a_rate_is_one_over_all_servers(tmp_path: Path) -> None:
    async def scenario(url: str) -> None:
        async with replica(url) as a, replica(url) as b, replica(url) as c:
            waits = await asyncio.gather(*(one(r.rates, key(6)) for _ in range(6) for r in (a, b, c)))
            assert sum(wait is None for wait in waits) == 6
            assert all(0 < wait <= 60.01 for wait in waits if wait is not None)
            assert await one(a.rates, key(6, name="other")) is None

    with redis_server(tmp_path) as redis:
        asyncio.run(scenario(redis.url))


@needs_redis
def test_so_many_run_at_once_over_all_servers(tmp_path: Path) -> None:
    async def scenario(url: str) -> None:
        async with replica(url) as a, replica(url) as b:
            limited = key(concurrent=2)
            async with a.rates.counted(limited), b.rates.counted(limited) as release:
                for rates in (a.rates, b.rates):
                    with pytest.raises(RateLimitError, match="2 requests running at once"):
                        async with rates.counted(limited):
                            pass
                assert await one(b.rates, limited, changes=True) is None
                await release()
                assert await one(a.rates, limited) is None
            assert await many(3, b.rates, limited) == [None] * 3

    with redis_server(tmp_path) as redis:
        asyncio.run(scenario(redis.url))


@needs_redis
def test_what_a_rate_refuses_leaves_no_lease(tmp_path: Path) -> None:
    async def scenario(url: str) -> None:
        async with replica(url) as a, replica(url) as b:
            limited = key(rate=1, concurrent=1)
            assert await one(a.rates, limited) is None
            assert (await one(a.rates, limited) or 0) > 50
            assert await one(b.rates, key(concurrent=1)) is None

    with redis_server(tmp_path) as redis:
        asyncio.run(scenario(redis.url))


@needs_redis
def test_the_leases_of_a_server_that_died_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(url: str) -> None:
        monkeypatch.setattr(limits_store, "LEASE_SECONDS", 2)
        async with replica(url) as alive:
            limited = key(concurrent=1)
            async with alive.rates.counted(limited):
                # Longer than a lease: it is renewed meanwhile.
                await asyncio.sleep(3)
                async with replica(url) as other:
                    assert await one(other.rates, limited) is not None
            dead = LimitsStore(url, Metrics())
            assert await dead.lease("work/team", "left behind", 1)
            assert await one(alive.rates, limited) is not None
            async with asyncio.timeout(PATIENCE):
                while await one(alive.rates, limited) is not None:
                    await asyncio.sleep(0.05)
            await dead._redis.aclose()
            await dead._redis.connection_pool.disconnect()

    with redis_server(tmp_path) as redis:
        asyncio.run(scenario(redis.url))


@needs_redis
def test_an_open_server_counts_for_itself_while_the_store_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(redis: RedisServer) -> None:
        async with replica(redis.url) as a, replica(redis.url) as b:
            assert await many(2, a.rates, key(3)) == [None] * 2
            redis.stop()
            # What it let through before is counted.
            assert [wait is None for wait in await many(3, a.rates, key(3))] == [True, False, False]
            assert [wait is None for wait in await many(4, b.rates, key(3))] == [True, True, True, False]
            assert [r.up for r in (a, b)] == [0, 0]
            assert a.metrics.registry.get_sample_value("steerserve_limits_store_failures_total") >= 1  # type: ignore[operator]
            async with a.rates.counted(key(concurrent=1, name="slow")):
                assert await one(a.rates, key(concurrent=1, name="slow")) is not None
                redis.start()
                await holds(lambda: a.up and b.up)
                # What began meanwhile is told to the store.
                assert await one(b.rates, key(concurrent=1, name="slow")) is not None
            waits = [wait for r in (a, b) for wait in await many(3, r.rates, key(3, name="new"))]
            assert sum(wait is None for wait in waits) == 3

    with redis_server(tmp_path) as redis, caplog.at_level(logging.INFO, "steerserve"):
        asyncio.run(scenario(redis))
    said = [record.getMessage() for record in caplog.records]
    assert sum("the store of limits is away" in line for line in said) == 2
    assert sum("the store of limits is back" in line for line in said) == 2


@needs_redis
def test_what_runs_is_told_to_a_store_that_comes_back_empty(tmp_path: Path) -> None:
    async def scenario(redis: RedisServer) -> None:
        async with replica(redis.url) as a, replica(redis.url) as b:
            async with a.rates.counted(key(concurrent=1)):
                redis.stop()
                await holds(lambda: not a.up and not b.up)
                redis.start()
                await holds(lambda: a.up and b.up)
                assert await one(b.rates, key(concurrent=1)) is not None
            assert await one(b.rates, key(concurrent=1)) is None

    with redis_server(tmp_path) as redis:
        asyncio.run(scenario(redis))


@needs_redis
def test_a_closed_server_refuses_limited_keys_while_the_store_is_away(tmp_path: Path) -> None:
    async def scenario(redis: RedisServer) -> None:
        async with replica(redis.url, closed=True) as a:
            redis.stop()
            for limited in (key(3), key(concurrent=3)):
                with pytest.raises(LimitsStoreError):
                    await one(a.rates, limited)
            assert await one(a.rates, key()) is None
            redis.start()
            await holds(lambda: a.up)
            assert await many(3, a.rates, key(3)) == [None] * 3

    with redis_server(tmp_path) as redis:
        asyncio.run(scenario(redis))


@needs_redis
@pytest.mark.parametrize("failure", ["open", "closed"])
def test_what_a_caller_is_told(tmp_path: Path, failure: str) -> None:
    path = keys_file(tmp_path, entry(rate_per_minute=2))
    headers = {"authorization": f"Bearer {SECRET}"}

    async def asked(app: object) -> Call:
        body = {"model": "text", "max_tokens": 1}
        return await Call("/v1/completions", body, headers=headers).run(app)  # type: ignore[arg-type]

    async def scenario(redis: RedisServer) -> None:
        config = ServerConfig(keys=path, limits_store=redis.url, limits_store_failure=failure, drain_seconds=5)  # type: ignore[arg-type]
        async with running(TextEngine(), config) as a, running(TextEngine(), config) as b:
            calls = [await asked(app) for app in (a, b, a, b)]
            assert [call.status for call in calls] == [200, 200, 429, 429]
            assert int(calls[-1].headers["retry-after"]) in range(1, 62)
            redis.stop()
            call = await asked(a)
            if failure == "open":
                assert call.status == 200
            else:
                assert (call.status, json.loads(call.body)["error"]["code"]) == (503, "limits_store_down")
                assert call.headers["retry-after"] == "1"

    with redis_server(tmp_path) as redis:
        asyncio.run(scenario(redis))


def test_the_flags_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="limits_store must be a redis"):
        ServerConfig(limits_store="http://nowhere", keys=Path("keys"))
    with pytest.raises(ValueError, match="needs keys"):
        ServerConfig(limits_store="redis://nowhere")
    with pytest.raises(SteerserveError, match="--limits-store is not a URL") as refused:
        LimitsStore("redis://user:pass#word@host:6379", Metrics())
    assert "pass" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(SteerserveError, match=r"--limits-store needs redis.asyncio: .*fleet"):
        LimitsStore("redis://nowhere", Metrics())
