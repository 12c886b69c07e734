"""The commitment profile: fractions, rho, and what it refuses."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schedulers import CommitmentProfile, rho
from schedulers.profile import coverage

VALUES = st.floats(-5, 5).map(lambda x: round(x, 4))
CURVES = st.lists(VALUES, min_size=2, max_size=40)
POSITIVE = st.floats(0.01, 100)


def plain_fractions(curve: list[float], blocks: int) -> list[float]:
    slices = len(curve) - 1

    def at(progress_times_blocks: int) -> float:
        whole, rest = divmod(progress_times_blocks * slices, blocks)
        if whole == slices:
            return curve[-1]
        return curve[whole] + (curve[whole + 1] - curve[whole]) * rest / blocks

    rises = [max(0.0, at(b + 1) - at(b)) for b in range(blocks)]
    total = sum(rises)
    return [rise / total for rise in rises] if total > 1e-9 else [1 / blocks] * blocks


def plain_rho(sensitivity: list[float], cost: list[float]) -> float:
    """sqrt(1 + CV^2) of s / c, mean and variance weighted by c: the other way of writing the theorem."""
    weights = [c / sum(cost) for c in cost]
    ratios = [s / c for s, c in zip(sensitivity, cost, strict=True)]
    mean = sum(w * x for w, x in zip(weights, ratios, strict=True))
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, ratios, strict=True))
    return math.sqrt(1 + variance / mean**2)


def profile_of(fractions: list[float]) -> CommitmentProfile:
    curve = [0.0]
    for fraction in fractions:
        curve.append(curve[-1] + fraction)
    return CommitmentProfile(tuple(curve))


@given(curve=CURVES, blocks=st.integers(1, 20))
def test_fractions_are_the_clamped_rises_between_block_borders(curve: list[float], blocks: int) -> None:
    expected = plain_fractions(curve, blocks)
    rising = sum(max(0.0, b - a) for a, b in zip(curve, curve[1:], strict=False))
    fractions = CommitmentProfile(tuple(curve)).fractions(blocks)
    assert fractions.dtype == torch.float64
    assert fractions.sum().item() == pytest.approx(1)
    if rising == 0 or CommitmentProfile(tuple(curve)).rises(blocks).sum() > 1e-6:
        assert fractions.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("curve", [(0.3,) * 8, (3.0, 2.0, 1.0, 0.5), (0.1, 0.1, 0.0)])
def test_a_curve_that_never_rises_has_uniform_fractions_and_says_so(curve: tuple[float, ...]) -> None:
    profile = CommitmentProfile(curve)
    assert not profile.forms
    assert profile.fractions(5).tolist() == [0.2] * 5
    assert profile.efficiency() == pytest.approx(1)


def test_a_curve_that_rises_somewhere_forms() -> None:
    assert CommitmentProfile((1.0, 0.5, 0.6)).forms


@pytest.mark.parametrize(
    ("fractions", "squared"),
    [
        ([0.125] * 8, 1.00),
        ([1.0] + [0.0] * 7, 8.00),
        ([0.8, 0.1, 0.1, 0, 0, 0, 0, 0], 5.28),
        ([0.3, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02], 1.58),
    ],
)
def test_efficiency_without_measurements_is_k_times_the_sum_of_squared_fractions(
    fractions: list[float], squared: float
) -> None:
    profile = profile_of(fractions)
    assert profile.efficiency() ** 2 == pytest.approx(squared, abs=0.005)
    assert profile.efficiency() ** 2 == pytest.approx(8 * sum(f * f for f in fractions))


def test_efficiency_takes_what_was_measured() -> None:
    curve, sensitivity, cost = (0.0, 1.0, 1.5, 1.75), (1.0, 3.0, 2.0), (2.0, 1.0, 4.0)
    fractions = [4 / 7, 2 / 7, 1 / 7]
    assert CommitmentProfile(curve, sensitivity=sensitivity, cost=cost).efficiency() == rho(sensitivity, cost)
    assert CommitmentProfile(curve, sensitivity=sensitivity).efficiency() == rho(sensitivity, (1.0,) * 3)
    assert CommitmentProfile(curve, cost=cost).efficiency() == pytest.approx(rho(fractions, cost))


@given(pairs=st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=30))
def test_rho_is_the_dispersion_of_sensitivity_over_cost_and_never_below_one(pairs: list[tuple[float, float]]) -> None:
    sensitivity, cost = [s for s, _ in pairs], [c for _, c in pairs]
    assert rho(sensitivity, cost) >= 1
    assert rho(sensitivity, cost) == pytest.approx(plain_rho(sensitivity, cost), rel=1e-9)


@given(cost=st.lists(POSITIVE, min_size=1, max_size=30), ratio=POSITIVE)
def test_rho_is_one_where_sensitivity_over_cost_is_constant(cost: list[float], ratio: float) -> None:
    assert rho([ratio * c for c in cost], cost) == pytest.approx(1, abs=1e-9)


@given(cost=st.lists(POSITIVE, min_size=2, max_size=30), ratio=POSITIVE, lift=st.floats(1.1, 10))
def test_rho_is_above_one_where_it_is_not_constant(cost: list[float], ratio: float, lift: float) -> None:
    sensitivity = [ratio * c for c in cost]
    sensitivity[0] *= lift
    assert rho(sensitivity, cost) > 1


@given(
    values=st.lists(st.tuples(st.floats(-3, 3), POSITIVE, st.floats(0, 2)), min_size=2, max_size=12),
    strength=st.floats(0.1, 2),
)
def test_no_schedule_of_the_same_cost_moves_the_attribute_further_than_rho_says(
    values: list[tuple[float, float, float]], strength: float
) -> None:
    sensitivity, cost, gains = ([value[i] for value in values] for i in range(3))
    if abs(sum(sensitivity)) < 0.1 or sum(gains) < 0.1:
        return
    spent = sum(c * g * g for c, g in zip(cost, gains, strict=True))
    scale = strength * math.sqrt(sum(cost) / spent)
    moved = abs(sum(s * g * scale for s, g in zip(sensitivity, gains, strict=True)))
    assert moved <= rho(sensitivity, cost) * strength * abs(sum(sensitivity)) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("sensitivity", "cost", "message"),
    [
        ([1.0], [0.0], "cost must be positive"),
        ([1.0, -1.0], [1.0, 1.0], "must not sum to 0"),
        ([1.0], [1.0, 1.0], "of one length"),
        ([], [], "1 or more"),
    ],
)
def test_rho_refuses_what_has_no_ratio(sensitivity: list[float], cost: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rho(sensitivity, cost)


@given(slices=st.integers(1, 40), blocks=st.integers(1, 40))
def test_coverage_is_the_share_of_each_slice_in_each_block(slices: int, blocks: int) -> None:
    shares = coverage(slices, blocks)
    assert shares.sum(1).tolist() == pytest.approx([1] * slices)
    for i in range(slices):
        for j in range(blocks):
            overlap = min((i + 1) / slices, (j + 1) / blocks) - max(i / slices, j / blocks)
            assert shares[i, j].item() == pytest.approx(max(0.0, overlap) * slices, abs=1e-9)


def test_cost_on_another_grid_is_its_mean_over_each_slice() -> None:
    profile = CommitmentProfile((0.0, 1.0, 2.0), cost=(4.0, 2.0))
    expected = {1: [3.0], 2: [4.0, 2.0], 3: [4.0, 3.0, 2.0], 4: [4.0, 4.0, 2.0, 2.0]}
    for slices, means in expected.items():
        cost = profile.cost_on(slices)
        assert cost is not None
        assert cost.tolist() == pytest.approx(means)
    assert CommitmentProfile((0.0, 1.0)).cost_on(4) is None


@given(
    curve=CURVES,
    measured=st.booleans(),
    samples=st.integers(1, 10**6),
)
def test_a_profile_survives_json_unchanged(curve: list[float], measured: bool, samples: int) -> None:
    slices = len(curve) - 1
    profile = CommitmentProfile(
        tuple(curve),
        standard_error=(0.1,) * (slices + 1) if measured else None,
        samples=samples,
        sensitivity=(0.5,) * slices if measured else None,
        cost=(1.5,) * slices if measured else None,
        sensitivity_error=(0.2,) * slices if measured else None,
        cost_error=(0.3,) * slices if measured else None,
    )
    again = CommitmentProfile.from_json(json.loads(json.dumps(profile.to_json())))
    assert again == profile
    assert hash(again) == hash(profile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curve": [0.0]}, "curve must have at least 2 values"),
        ({"curve": [0.0, math.nan, 1.0]}, r"curve\[1\] must be a finite number, not nan"),
        ({"curve": [0.0, math.inf, 1.0]}, r"curve\[1\] must be a finite number, not inf"),
        ({"curve": [0.0, True, 1.0]}, r"curve\[1\] must be a finite number, not True"),
        ({"curve": [0.0, "1", 1.0]}, r"curve\[1\] must be a finite number, not '1'"),
        ({"curve": "abc"}, "curve must be a list of numbers"),
        ({"samples": 0}, "samples must be an integer, 1 or more, not 0"),
        ({"samples": 1.5}, "samples must be an integer"),
        ({"standard_error": [0.1, 0.1]}, "standard_error must have 3 values"),
        ({"standard_error": [0.1, -0.1, 0.1]}, r"standard_error\[1\] must be a finite number, 0 or more"),
        ({"sensitivity": [1.0, 1.0, 1.0]}, "sensitivity must have 2 values for a curve of 2 slices, not 3"),
        ({"sensitivity": [1.0, -1.0]}, "sensitivity must not sum to 0"),
        ({"cost": [1.0]}, "cost must have 2 values"),
        ({"cost": [1.0, 0.0]}, "cost must be positive: it is 0 in slice 1"),
        ({"cost": [1.0, -1.0]}, r"cost\[1\] must be a finite number, 0 or more"),
        ({"sensitivity_error": [0.1]}, "sensitivity_error must have 2 values for a curve of 2 slices, not 1"),
        ({"cost_error": [0.1, -0.1]}, r"cost_error\[1\] must be a finite number, 0 or more"),
        (
            {"extra": 1},
            "unknown keys 'extra'; allowed: curve, standard_error, samples, sensitivity, cost, sens",
        ),
    ],
)
def test_from_json_refuses_what_is_no_profile(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CommitmentProfile.from_json({"curve": [0.0, 1.0, 2.0], "samples": 3} | change)


def test_from_json_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="lacks curve and samples"):
        CommitmentProfile.from_json({})
