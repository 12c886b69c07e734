import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.server.auth.keys import Key
from steerserve.server.auth.policy import Policy
from steerserve.server.auth.rate import Rates
from steerserve.server.errors import RateLimitError

MARGIN = 0.002
"""Seconds by which the wait for a place is the longer, so that a request one whole window ago counts no more."""


class Clock:
    """The clock of what runs, and of the window."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def at(clock: Clock) -> Iterator[Rates]:
    """Rates that live by this clock: that of the library `limits` is the system's."""
    with patch.object(time, "time", clock):
        yield Rates(clock=clock)


def key(rate: int | None = None, concurrent: int | None = None, name: str = "team") -> Key:
    return Key(name, "0" * 64, rate, concurrent, Policy())


async def one(rates: Rates, of: Key, changes: bool = False) -> float | None:
    """The seconds to wait, None for a request that was let through."""
    try:
        async with rates.counted(of, changes):
            return None
    except RateLimitError as error:
        return error.retry_after


async def many(count: int, rates: Rates, of: Key, changes: bool = False) -> list[float | None]:
    return [await one(rates, of, changes) for _ in range(count)]


def run(scenario: Callable[[Rates, Clock], Coroutine[Any, Any, None]]) -> None:
    clock = Clock()

    async def made() -> None:
        with at(clock) as rates:
            await scenario(rates, clock)

    asyncio.run(made())


@given(st.integers(1, 5), st.lists(st.floats(0, 40), max_size=60))
def test_no_minute_holds_more_than_the_rate(rate: int, gaps: list[float]) -> None:
    async def scenario(rates: Rates, clock: Clock) -> None:
        passed: list[float] = []
        for gap in gaps:
            clock.now += gap
            wait = await one(rates, key(rate))
            recent = [moment for moment in passed if moment >= clock.now - 60]
            assert (wait is None) == (len(recent) < rate)
            if wait is None:
                passed.append(clock.now)
            else:
                assert wait == pytest.approx(recent[-rate] + 60 - clock.now, abs=MARGIN)

    run(scenario)


def test_after_the_wait_there_is_room() -> None:
    async def scenario(rates: Rates, clock: Clock) -> None:
        assert [wait is None for wait in await many(3, rates, key(2))] == [True, True, False]
        wait = await one(rates, key(2))
        assert wait is not None
        clock.now += wait
        assert await one(rates, key(2)) is None

    run(scenario)


def test_keys_are_counted_apart_and_a_lower_rate_counts_what_was() -> None:
    async def scenario(rates: Rates, _: Clock) -> None:
        assert await many(3, rates, key(3)) == [None] * 3
        assert await one(rates, key(3, name="other")) is None
        assert await one(rates, key(1)) == pytest.approx(60, abs=MARGIN)
        assert await one(rates, key(4)) is None

    run(scenario)


def test_only_so_many_run_at_once() -> None:
    async def scenario(rates: Rates, clock: Clock) -> None:
        limited = key(concurrent=2)
        async with rates.counted(limited):
            clock.now += 8
        async with rates.counted(limited), rates.counted(limited):
            clock.now += 3
            with pytest.raises(RateLimitError, match="2 requests running") as refused:
                async with rates.counted(limited):
                    pass
            # They take 8 seconds, and 3 have passed.
            assert refused.value.retry_after == pytest.approx(5)
        assert await one(rates, limited) is None

    run(scenario)


def test_a_request_that_is_released_early_makes_room_and_is_counted_once() -> None:
    async def scenario(rates: Rates, clock: Clock) -> None:
        limited = key(concurrent=1)
        async with rates.counted(limited) as release:
            clock.now += 8
            await release()
            async with rates.counted(limited):
                clock.now += 4
                await release()
                assert await one(rates, limited) == pytest.approx(8)
        assert await one(rates, limited) is None

    run(scenario)


def test_what_is_refused_is_not_counted() -> None:
    async def scenario(rates: Rates, clock: Clock) -> None:
        limited = key(rate=1)
        assert await one(rates, limited) is None
        assert None not in await many(10, rates, limited)
        clock.now += 60 + MARGIN
        assert await one(rates, limited) is None

    run(scenario)


def test_changes_are_held_by_their_own_number_at_once_and_by_the_one_rate() -> None:
    async def scenario(rates: Rates, _: Clock) -> None:
        limited = key(rate=3, concurrent=1)
        async with rates.counted(limited):
            with pytest.raises(RateLimitError, match="1 changes of generations"):
                async with rates.counted(limited, changes=True), rates.counted(limited, changes=True):
                    pass
            assert await one(rates, limited, changes=True) is None
            assert await one(rates, limited, changes=True) == pytest.approx(60, abs=MARGIN)
        async with rates.counted(key(concurrent=1), changes=True):
            assert await one(rates, key(concurrent=1)) is None

    run(scenario)


def test_how_long_changes_take_says_nothing_of_when_a_generation_ends() -> None:
    async def scenario(rates: Rates, clock: Clock) -> None:
        limited = key(concurrent=2)
        async with rates.counted(limited):
            clock.now += 8
        assert await many(50, rates, limited, changes=True) == [None] * 50
        async with rates.counted(limited), rates.counted(limited):
            clock.now += 3
            assert await one(rates, limited) == pytest.approx(5)

    run(scenario)
