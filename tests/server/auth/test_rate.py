import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.server.auth.keys import Key
from steerserve.server.auth.policy import Policy
from steerserve.server.auth.rate import Rates
from steerserve.server.errors import RateLimitError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(rate: int | None = None, concurrent: int | None = None, name: str = "team") -> Key:
    return Key(name, "0" * 64, rate, concurrent, Policy())


def one(rates: Rates, of: Key, changes: bool = False) -> float | None:
    """The seconds to wait, None for a request that was let through."""
    try:
        with rates.counted(of, changes):
            return None
    except RateLimitError as error:
        return error.retry_after


@given(st.integers(1, 5), st.lists(st.floats(0, 40), max_size=60))
def test_no_minute_holds_more_than_the_rate(rate: int, gaps: list[float]) -> None:
    clock = Clock()
    rates = Rates(clock)
    passed: list[float] = []
    for gap in gaps:
        clock.now += gap
        wait = one(rates, key(rate))
        recent = [moment for moment in passed if clock.now - moment < 60]
        assert (wait is None) == (len(recent) < rate)
        if wait is None:
            passed.append(clock.now)
        else:
            assert wait == pytest.approx(recent[-rate] + 60 - clock.now)


def test_after_the_wait_there_is_room() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert [one(rates, key(2)) is None for _ in range(3)] == [True, True, False]
    wait = one(rates, key(2))
    assert wait is not None
    clock.now += wait
    assert one(rates, key(2)) is None


def test_keys_are_counted_apart_and_a_lower_rate_counts_what_was() -> None:
    rates = Rates(Clock())
    assert [one(rates, key(3)) for _ in range(3)] == [None] * 3
    assert one(rates, key(3, name="other")) is None
    assert one(rates, key(1)) == pytest.approx(60)
    assert one(rates, key(4)) is None


def test_only_so_many_run_at_once() -> None:
    clock = Clock()
    rates = Rates(clock)
    limited = key(concurrent=2)
    with rates.counted(limited):
        clock.now += 8
    with rates.counted(limited), rates.counted(limited):
        clock.now += 3
        with pytest.raises(RateLimitError, match="2 requests running") as refused, rates.counted(limited):
            pass
        # They take 8 seconds, and 3 have passed.
        assert refused.value.retry_after == pytest.approx(5)
    assert one(rates, limited) is None


def test_what_is_refused_is_not_counted() -> None:
    clock = Clock()
    rates = Rates(clock)
    limited = key(rate=1)
    assert one(rates, limited) is None
    for _ in range(10):
        assert one(rates, limited) is not None
    clock.now += 60
    assert one(rates, limited) is None


def test_changes_are_held_by_their_own_number_at_once_and_by_the_one_rate() -> None:
    rates = Rates(Clock())
    limited = key(rate=3, concurrent=1)
    with rates.counted(limited):
        with (
            rates.counted(limited, changes=True),
            pytest.raises(RateLimitError, match="1 changes of generations"),
            rates.counted(limited, changes=True),
        ):
            pass
        assert one(rates, limited, changes=True) is None
        assert one(rates, limited, changes=True) == pytest.approx(60)
    with rates.counted(key(concurrent=1), changes=True):
        assert one(rates, key(concurrent=1)) is None


def test_how_long_changes_take_says_nothing_of_when_a_generation_ends() -> None:
    clock = Clock()
    rates = Rates(clock)
    limited = key(concurrent=2)
    with rates.counted(limited):
        clock.now += 8
    assert [one(rates, limited, changes=True) for _ in range(50)] == [None] * 50
    with rates.counted(limited), rates.counted(limited):
        clock.now += 3
        assert one(rates, limited) == pytest.approx(5)
