"""Intervals, tests and interpolation against what they are defined to be."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.steering.analysis import statistics


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    index = statistics.resamples(40, 400, seed=1)
    hits = 0
    for _ in range(200):
        sample = random.normal(3.0, 2.0, size=40)
        low, high = statistics.interval(sample[index].mean(1)[1:])
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_first_resample_is_the_sample_and_the_others_are_drawn_from_it() -> None:
    index = statistics.resamples(5, 50)
    assert index.shape == (51, 5)
    assert index[0].tolist() == [0, 1, 2, 3, 4]
    assert index.min() >= 0 and index.max() <= 4
    with pytest.raises(ValueError, match="got 0"):
        statistics.resamples(0)


def test_halves_share_no_row() -> None:
    even, odd = statistics.halves(7)
    assert sorted([*even.tolist(), *odd.tolist()]) == list(range(7))


def test_flipping_signs_gives_the_exact_p_of_all_flips() -> None:
    differences = np.array([1.0, 2.0, -0.5, 3.0, 0.0])
    known = differences[differences != 0]
    flips = [abs(float(np.dot(signs, known))) for signs in itertools.product((-1, 1), repeat=len(known))]
    exact = np.mean([flip >= abs(known.sum()) for flip in flips])
    assert statistics.sign_flip(differences, draws=40_000) == pytest.approx(exact, abs=0.01)
    assert statistics.sign_flip(np.zeros(4)) == 1.0


def test_flipping_signs_is_the_permutation_test_of_scipy() -> None:
    from scipy.stats import permutation_test

    differences = np.random.default_rng(2).normal(0.4, 1.0, 24)
    tested = permutation_test(
        (differences,), np.mean, vectorized=True, permutation_type="samples", n_resamples=20_000, random_state=0
    )
    assert statistics.sign_flip(differences, draws=20_000) == pytest.approx(tested.pvalue, abs=0.01)


def test_the_interval_of_a_mean_is_the_percentile_bootstrap_of_scipy() -> None:
    from scipy.stats import bootstrap

    sample = np.random.default_rng(3).normal(3.0, 2.0, 40)
    drawn = bootstrap((sample,), np.mean, n_resamples=9999, method="percentile", random_state=0)
    low, high = statistics.interval(sample[statistics.resamples(40, 9999)].mean(1)[1:])
    assert (low, high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.05)


def test_an_equal_difference_in_every_row_cannot_be_luck() -> None:
    assert statistics.sign_flip(np.ones(20)) < 0.001


def test_parts_of_rows_are_their_means_where_tasks_have_as_many() -> None:
    several = [np.array([1.0, 0.0, 4.0]), np.array([3.0, 2.0, -1.0])]
    assert statistics.row_parts(several) == pytest.approx(np.mean(several, axis=0))


@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=9), min_size=1, max_size=4))
def test_the_mean_of_parts_counts_every_task_alike(several: list[list[float]]) -> None:
    parts = statistics.row_parts([np.array(values) for values in several])
    assert len(parts) == max(map(len, several))
    assert parts.mean() == pytest.approx(np.mean([sum(values) / len(values) for values in several]))


@given(st.lists(st.floats(-2, 9), min_size=1, max_size=6))
def test_weights_interpolate_as_lines_do(points: list[float]) -> None:
    grid, values = np.array([0.0, 0.5, 2.0, 5.0]), np.array([1.0, -1.0, 4.0, 4.5])
    found = statistics.weights(np.array(points), grid)
    assert found.sum(-1) == pytest.approx(np.ones(len(points)))
    assert found @ values == pytest.approx(np.interp(points, grid, values))


def test_a_crossing_is_where_the_running_maximum_reaches_the_level() -> None:
    grid = np.array([0.0, 1.0, 2.0, 4.0])
    curves = np.array([[0.0, 1.0, 2.0, 4.0], [0.0, 3.0, 1.0, 5.0], [0.0, 0.5, 0.6, 0.7]])
    found = statistics.crossing(np.array([1.5, 4.0, 2.0]), curves, grid)
    assert found[:2] == pytest.approx([1.5, 3.0])
    assert np.isnan(found[2])


def test_ranks_share_ties_and_see_any_rising_curve() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    assert statistics.rank_correlation(x, [1.0, 8.0, 27.0, 64.0]) == pytest.approx(1.0)
    assert statistics.rank_correlation(x, [5.0, 5.0, 6.0, 6.0]) == pytest.approx(2 / 5**0.5)
    assert np.isnan(statistics.correlation([1.0, 2.0], [1.0, 2.0]))
    assert np.isnan(statistics.correlation(x, [1.0] * 4))
