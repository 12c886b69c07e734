"""Intervals against published values."""

import numpy as np
import pytest

from steerserve.calibrate.intervals import bootstrap_ratio, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_table(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_inside() -> None:
    low, high = wilson(20, 20)
    assert high == 1.0
    assert 1.0 - low == pytest.approx(wilson(0, 20)[1])


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {count}"):
        wilson(successes, count)


def test_pairs_are_drawn_together() -> None:
    below = np.random.default_rng(0).uniform(1, 9, 40)
    low, high = bootstrap_ratio((1.1 * below).tolist(), below.tolist())
    # Were the two drawn apart, the spread of `below` would show.
    assert (low, high) == pytest.approx((1.1, 1.1))
    apart = bootstrap_ratio((1.1 * below[::-1]).tolist(), below.tolist())
    assert apart[1] - apart[0] > 0.1


def test_the_bootstrap_covers_the_ratio_and_narrows() -> None:
    random = np.random.default_rng(1)
    few, many = (random.normal([2.0, 1.0], 0.2, (n, 2)).T.tolist() for n in (20, 2000))
    wide, narrow = bootstrap_ratio(*few), bootstrap_ratio(*many)
    assert narrow[0] < 2.0 < narrow[1]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 4


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        bootstrap_ratio([1.0, 2.0], [1.0])
