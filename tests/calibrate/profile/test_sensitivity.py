"""What pulses do: paired effects, and what of their spread is noise."""

import math

import numpy as np
import pytest

from steerserve.calibrate.profile.sensitivity import UNSURE, Effects, log_odds, shrink, spread, summary

COST = np.array([4.0, 2.0, 1.0, 1.0])


def closed_form(s: np.ndarray, c: np.ndarray) -> float:
    return math.sqrt(c.sum() * (s * s / c).sum() / s.sum() ** 2)


def test_without_noise_nothing_is_shrunk() -> None:
    means = np.array([1.0, 2.0, 0.5, -0.2])
    found = shrink(means, np.zeros((4, 4)), COST)
    assert found.values == pytest.approx(means) and found.factors == pytest.approx(np.ones(4))
    wanted = pytest.approx(closed_form(means, COST), abs=1e-4)
    assert all(found.rho[kind] == wanted for kind in ("raw", "corrected", "shrunk"))


def test_a_spread_that_noise_explains_is_taken_for_none() -> None:
    means = COST * np.array([1.0, 1.1, 0.9, 1.05])
    found = shrink(means, np.diag(np.full(4, 1.0)), COST)
    assert found.values == pytest.approx(COST * means.sum() / COST.sum())
    assert found.rho["corrected"] == found.rho["shrunk"] == 1.0 and (found.rho["raw"] or 0) > 1


def test_each_window_is_pulled_by_its_own_share_of_noise() -> None:
    means, noise = np.array([8.0, 2.0, 3.0, 0.0]), np.array([0.1, 0.1, 0.6, 0.0])
    found = shrink(means, np.diag(noise), COST)
    x = [mean / cost for mean, cost in zip(means, COST, strict=True)]
    middle = sum(means) / sum(COST)
    shares = [cost / sum(COST) for cost in COST]
    wrong = [variance / cost**2 for variance, cost in zip(noise, COST, strict=True)]
    variance = sum(share * (one - middle) ** 2 for share, one in zip(shares, x, strict=True))
    variance -= sum(share * (1 - share) * one for share, one in zip(shares, wrong, strict=True))
    kept = [variance / (variance + one) for one in wrong]
    assert found.factors == pytest.approx(kept) and found.factors[3] == 1.0
    wanted = [cost * (middle + k * (one - middle)) for cost, k, one in zip(COST, kept, x, strict=True)]
    assert found.values == pytest.approx(wanted)
    # Pulled by different shares, they no longer sum to what was measured.
    assert abs(found.values.sum() - means.sum()) > 0.1


def test_noise_that_all_windows_share_is_not_dispersion() -> None:
    # The common unsteered run moves all windows' s / c alike where they cost alike.
    means = np.array([1.0, 2.0, 1.5, 0.5])
    found = shrink(means, np.full((4, 4), 0.3), np.ones(4))
    assert found.rho["corrected"] == pytest.approx(closed_form(means, np.ones(4)), abs=1e-4)


def test_the_correction_takes_the_noise_out_of_rho_on_average() -> None:
    random = np.random.default_rng(0)
    truth = np.array([6.0, 1.0, 0.5, 0.5])
    shape = 0.15 * random.normal(size=(4, 4)) + 0.5 * np.eye(4)
    covariance = shape @ shape.T
    draws = truth + random.normal(size=(4000, 4)) @ shape.T
    found = [shrink(means, covariance, COST).rho for means in draws]
    squares = {kind: float(np.mean([(one[kind] or 0) ** 2 for one in found])) - 1 for kind in ("raw", "corrected")}
    wanted = closed_form(truth, COST) ** 2 - 1
    assert abs(squares["corrected"] - wanted) < 0.35 * abs(squares["raw"] - wanted)


def test_shrinking_brings_sensitivities_nearer_to_the_truth() -> None:
    random = np.random.default_rng(1)
    truth, noise = COST * np.array([1.5, 1.0, 0.7, 1.2]), np.diag([0.5, 1.0, 1.0, 2.0])
    draws = truth + random.normal(size=(500, 4)) * np.sqrt(noise.diagonal())
    raw = np.square((draws - truth) / COST).mean()
    pulled = np.square([(shrink(means, noise, COST).values - truth) / COST for means in draws]).mean()
    assert pulled < 0.7 * raw


def test_a_windows_slices_sum_to_its_pulse() -> None:
    values = spread([3.0, 1.0, -2.0], [(0, 1), (1, 3), (3, 8)])
    assert values == pytest.approx([3.0, 0.5, 0.5, *[-0.4] * 5])


def test_log_odds_are_finite() -> None:
    assert log_odds([0.5, 0.8]) == pytest.approx([0.0, math.log(4)])
    assert np.isfinite(log_odds([0.0, 1.0])).all()


def test_effects_are_means_over_pairs_with_their_errors() -> None:
    random = np.random.default_rng(3)
    windows = random.normal(size=(50, 3)) + np.array([1.0, 0.5, 0.0])
    effects = Effects(windows, windows.sum(1) * 0.8)
    assert effects.means == pytest.approx(windows.mean(0))
    assert effects.errors == pytest.approx(windows.std(axis=0, ddof=1) / math.sqrt(50))
    found = effects.additivity()
    assert found["ratio"] == pytest.approx(1.25, abs=1e-4) and found["ratio_error"] == pytest.approx(0, abs=1e-4)
    assert Effects(windows, np.zeros(50)).additivity()["ratio"] is None


def test_the_summary_says_where_nothing_can_be_trusted() -> None:
    random = np.random.default_rng(3)
    windows = [(0, 1), (1, 4)]
    sure = random.normal(size=(40, 2)) + 3
    for values, note in ((sure, None), (sure - sure.mean(0), UNSURE)):
        effects = Effects(values, values.sum(1))
        found = summary(effects, shrink(effects.means, effects.covariance, np.ones(2)), windows)
        assert found["note"] == note and found["pairs"] == 40 and found["windows"] == [[0, 1], [1, 4]]
