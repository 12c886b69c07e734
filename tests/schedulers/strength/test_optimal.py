"""The optimal schedule against the closed form and a numerical optimiser."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from schedulers import CommitmentProfile, build_strength, compile_gains, rho
from schedulers.strength import Optimal

POSITIVE = st.floats(0.05, 20)
FORWARD = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=30)
EITHER = st.lists(st.tuples(st.floats(-3, 3), POSITIVE), min_size=1, max_size=30)


def measured(sensitivity: list[float], cost: list[float]) -> CommitmentProfile:
    curve = tuple(float(i) for i in range(len(cost) + 1))
    return CommitmentProfile(curve, sensitivity=tuple(sensitivity), cost=tuple(cost))


def split(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [s for s, _ in pairs], [c for _, c in pairs]


@given(pairs=FORWARD)
def test_at_the_cost_of_uniform_it_moves_the_attribute_rho_times_as_far(pairs: list[tuple[float, float]]) -> None:
    sensitivity, cost = split(pairs)
    table = compile_gains(Optimal(), None, measured(sensitivity, cost), len(cost))
    gains = table.gains.tolist()
    assert table.norm == "kl"
    assert table.note is None
    assert sum(c * g * g for c, g in zip(cost, gains, strict=True)) == pytest.approx(sum(cost), rel=1e-5)
    moved = sum(s * g for s, g in zip(sensitivity, gains, strict=True)) / sum(sensitivity)
    # 1 + CV^2 of s / c, its mean and variance weighted by c.
    mean = sum(sensitivity) / sum(cost)
    variance = sum(c * (s / c - mean) ** 2 for s, c in pairs) / sum(cost)
    assert moved == pytest.approx(math.sqrt(1 + variance / mean**2), rel=1e-5)
    assert moved == pytest.approx(rho(sensitivity, cost), rel=1e-5)
    assert moved == pytest.approx(table.rho, rel=1e-5)


@settings(max_examples=25)
@given(pairs=st.lists(st.tuples(st.floats(-2, 2), st.floats(0.2, 5)), min_size=2, max_size=7))
def test_no_optimiser_finds_better_gains_of_the_same_cost(pairs: list[tuple[float, float]]) -> None:
    from scipy.optimize import minimize

    sensitivity, cost = (np.array(values) for values in split(pairs))
    assume(sensitivity.max() > 0.1 and abs(sensitivity.sum()) > 0.05)
    budget = cost.sum()
    gains = np.array(compile_gains(Optimal(), None, measured(*split(pairs)), len(cost)).gains.tolist())
    found = minimize(
        lambda g: -sensitivity @ g,
        np.ones(len(cost)),
        jac=lambda _: -sensitivity,
        bounds=[(0, None)] * len(cost),
        constraints={"type": "ineq", "fun": lambda g: budget - cost @ g**2, "jac": lambda g: -2 * cost * g},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-10},
    )
    best = found.x.clip(0)
    best *= np.sqrt(budget / (cost @ best**2))
    assert cost @ gains**2 == pytest.approx(budget, rel=1e-5)
    assert sensitivity @ best <= sensitivity @ gains * (1 + 1e-5)
    assert sensitivity @ best == pytest.approx(sensitivity @ gains, rel=1e-4)


@given(cost=st.lists(POSITIVE, min_size=1, max_size=30), power=st.integers(-6, 6), slices=st.integers(1, 70))
def test_where_sensitivity_over_cost_is_constant_it_is_uniform_exactly(
    cost: list[float], power: int, slices: int
) -> None:
    profile = measured([2.0**power * c for c in cost], cost)
    table = compile_gains(Optimal(), None, profile, slices)
    assert table.gains.tolist() == pytest.approx([1.0] * slices, abs=1e-6)
    assert table.rho == pytest.approx(1)
    assert len(set(Optimal().shape(len(cost), profile).tolist())) == 1


@given(pairs=FORWARD, lift=st.floats(1.01, 10))
def test_elsewhere_it_is_not_uniform(pairs: list[tuple[float, float]], lift: float) -> None:
    assume(len(pairs) > 1)
    cost = split(pairs)[1]
    gains = compile_gains(Optimal(), None, measured([lift * cost[0], *cost[1:]], cost), len(cost)).gains
    assert gains[0] > 1 > gains[1]


@given(pairs=EITHER)
def test_backward_slices_get_nothing_and_the_note_says_what_is_left(pairs: list[tuple[float, float]]) -> None:
    sensitivity, cost = split(pairs)
    assume(sum(sensitivity) > 0.05 and max(sensitivity) > 0.05)
    profile = measured(sensitivity, cost)
    table = compile_gains(Optimal(), None, profile, len(cost))
    gains = table.gains.tolist()
    assert all(g == 0 for g, s in zip(gains, sensitivity, strict=True) if s <= 0)
    backwards = sum(s < 0 for s in sensitivity)
    if not backwards:
        assert table.note is None
        return
    moved = sum(s * g for s, g in zip(sensitivity, gains, strict=True)) / sum(sensitivity)
    assert f"in {backwards} of {len(cost)} slices" in str(table.note)
    assert float(str(table.note).rsplit(" ", 1)[1]) == pytest.approx(moved, rel=1e-3)
    assert table.rho is not None
    assert moved <= table.rho * (1 + 1e-5)


def test_what_only_moves_backwards_is_pushed_uniformly_and_says_so() -> None:
    table = compile_gains(Optimal(), None, measured([-1.0, -2.0, 0.0], [1.0, 1.0, 1.0]), 6)
    assert table.gains.tolist() == [1.0] * 6
    assert "applied uniformly" in str(table.note)
    mostly = compile_gains(Optimal(), None, measured([-1.0, 0.5], [1.0, 1.0]), 2)
    assert mostly.gains.tolist() == pytest.approx([0.0, math.sqrt(2)])
    assert "moves it backwards as a whole" in str(mostly.note)


@given(pairs=FORWARD, times=st.integers(1, 4))
def test_a_finer_grid_repeats_the_gains(pairs: list[tuple[float, float]], times: int) -> None:
    profile = measured(*split(pairs))
    coarse = compile_gains(Optimal(), None, profile, len(pairs)).gains.tolist()
    fine = compile_gains(Optimal(), None, profile, len(pairs) * times).gains.tolist()
    assert fine == pytest.approx([gain for gain in coarse for _ in range(times)], rel=1e-5)


def test_a_coarser_grid_takes_the_best_gain_that_is_constant_within_a_slice() -> None:
    profile = measured([4.0, 2.0, 1.0, 1.0], [1.0, 3.0, 1.0, 3.0])
    assert Optimal().shape(2, profile).tolist() == pytest.approx([6 / 4, 2 / 4])


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (None, "schedule 'optimal' needs a commitment profile"),
        (CommitmentProfile((0.0, 1.0)), "this attribute's profile has no sensitivity and cost"),
        (CommitmentProfile((0.0, 1.0), cost=(1.0,)), "has no sensitivity$"),
        (CommitmentProfile((0.0, 1.0), sensitivity=(1.0,)), "has no cost$"),
    ],
)
def test_without_measurements_it_is_refused(profile: CommitmentProfile | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_gains(Optimal(), None, profile)
    with pytest.raises(ValueError, match=message):
        Optimal().shape(4, profile)


def test_it_is_chosen_by_name_and_takes_no_options() -> None:
    assert build_strength("optimal") == (Optimal(), None)
    assert build_strength({"type": "optimal", "norm": "peak"}) == (Optimal(), "peak")
    with pytest.raises(ValueError, match="schedule 'optimal' has no option 'gate'; allowed: norm"):
        build_strength({"type": "optimal", "gate": 0.1})
