"""Compiled gains: the norms, their defaults, and the lookup by progress."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from schedulers import NORMS, CommitmentProfile, StrengthSchedule, build_strength, compile_gains, slice_of
from schedulers.strength import Commitment, Piecewise, Uniform, Window

SCHEDULES: st.SearchStrategy[StrengthSchedule] = st.sampled_from(
    [Uniform(), Window(0.1, 0.33), Piecewise(preset="ramp_down"), Piecewise(((0.2, 0.5), (0.7, 2.0))), Commitment()]
)
CURVES = st.lists(st.integers(-50, 50).map(lambda i: i / 10), min_size=5, max_size=20)
COSTS = st.floats(0.01, 100)


def profile(curve: list[float], cost: float | None = None) -> CommitmentProfile:
    slices = len(curve) - 1
    costs = None if cost is None else tuple(cost / (1 + i) for i in range(slices))
    return CommitmentProfile(tuple(curve), cost=costs)


@given(schedule=SCHEDULES, curve=CURVES, cost=COSTS, slices=st.integers(1, 70), norm=st.sampled_from(NORMS))
def test_every_norm_holds(schedule: StrengthSchedule, curve: list[float], cost: float, slices: int, norm: str) -> None:
    measured = profile(curve, cost)
    table = compile_gains(schedule, norm, measured, slices)
    gains = table.gains.double().tolist()
    assert table.norm == norm
    assert table.gains.shape == (slices,)
    assert table.gains.dtype == torch.float32
    assert min(gains) >= 0
    costs = measured.cost_on(slices)
    assert costs is not None
    match norm:
        case "kl":
            spent = sum(c * g * g for c, g in zip(costs.tolist(), gains, strict=True))
            assert spent == pytest.approx(sum(costs.tolist()), rel=1e-5)
        case "l2":
            assert sum(g * g for g in gains) == pytest.approx(slices, rel=1e-5)
        case "mean":
            assert sum(gains) == pytest.approx(slices, rel=1e-5)
        case _:
            assert max(gains) == pytest.approx(1, rel=1e-6)


@given(schedule=SCHEDULES, curve=CURVES, slices=st.integers(1, 70), norm=st.sampled_from(("l2", "mean", "peak")))
def test_norms_only_scale_the_shape(schedule: StrengthSchedule, curve: list[float], slices: int, norm: str) -> None:
    shape = schedule.shape(slices, profile(curve))
    gains = compile_gains(schedule, norm, profile(curve), slices).gains.double()
    assert (gains / gains.max()).tolist() == pytest.approx((shape / shape.max()).tolist(), abs=1e-6)


@given(slope=st.floats(0.1, 5), blocks=st.integers(1, 32), norm=st.sampled_from(NORMS))
def test_commitment_of_a_flat_profile_equals_uniform(slope: float, blocks: int, norm: str) -> None:
    flat = profile([slope * i for i in range(17)], cost=2.0)
    assert compile_gains(Commitment(blocks), norm, flat).gains.tolist() == pytest.approx([1] * 64)
    assert compile_gains(Uniform(), norm, flat).gains.tolist() == [1.0] * 64


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("mean", [2.4, 2.0, 1.2, 0.8, 0.64, 0.48, 0.32, 0.16]),
        ("l2", [1.91, 1.59, 0.96, 0.64, 0.51, 0.38, 0.25, 0.13]),
    ],
)
def test_multipliers_of_a_sentiment_like_attribute(norm: str, expected: list[float]) -> None:
    fractions = [0.3, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02]
    curve = [sum(fractions[:i]) for i in range(9)]
    gains = compile_gains(Commitment(8, gate=0.01), norm, profile(curve), slices=8).gains
    assert gains.tolist() == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("schedule", "cost", "norm"),
    [
        (Uniform(), 1.0, "kl"),
        (Uniform(), None, "l2"),
        (Commitment(), 1.0, "kl"),
        (Commitment(), None, "l2"),
        (Window(0.0, 0.5), 1.0, "peak"),
        (Piecewise(preset="ramp_up"), 1.0, "peak"),
    ],
)
def test_the_norm_nobody_named(schedule: StrengthSchedule, cost: float | None, norm: str) -> None:
    assert compile_gains(schedule, None, profile([0.0, 1.0, 1.5], cost)).norm == norm


def test_a_window_of_strength_s_is_strength_s_inside() -> None:
    assert compile_gains(Window(0.25, 0.5), None, None, slices=8).gains.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


@given(
    borders=st.tuples(st.integers(0, 1000), st.integers(0, 1000)).filter(lambda b: b[0] < b[1]),
    length=st.integers(1, 300),
    norm=st.sampled_from([None, "l2", "mean", "peak"]),
)
@example(borders=(0, 2), length=96, norm=None)
@example(borders=(0, 1000), length=10, norm=None)
@example(borders=(300, 700), length=10, norm=None)
def test_a_window_pushes_at_the_progress_inside_it_and_at_none_outside(
    borders: tuple[int, int], length: int, norm: str | None
) -> None:
    start, stop = borders
    table = compile_gains(Window(start / 1000, stop / 1000), norm, None)
    done = torch.arange(length)
    full = float(table.gains.max())
    expected = [full if start * length <= 1000 * i < stop * length else 0.0 for i in range(length)]
    assert table.at(done.double() / length).tolist() == expected
    assert table.at(done.float() / length).tolist() == expected


@given(schedule=SCHEDULES.filter(lambda one: not isinstance(one, Window)), at=st.floats(0, 1))
def test_other_schedules_push_by_the_slice(schedule: StrengthSchedule, at: float) -> None:
    table = compile_gains(schedule, None, profile([0.0, 1.0, 1.5]))
    assert float(table.at(torch.tensor([at]))) == float(table.gains[slice_of(torch.tensor([at]), 64)])


def test_rho_and_note_come_with_the_table() -> None:
    rising, falling = profile([0.0, 1.0, 1.5]), profile([1.0, 0.5, 0.2])
    assert compile_gains(Uniform(), None, None).rho is None
    assert compile_gains(Uniform(), None, rising).rho == rising.efficiency()
    assert compile_gains(Commitment(), None, rising).note is None
    fallen_back = compile_gains(Commitment(), None, falling)
    assert fallen_back.gains.tolist() == [1.0] * 64
    assert "uniformly" in str(fallen_back.note)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule 'commitment' needs a commitment profile"):
        compile_gains(Commitment(), None, None)
    with pytest.raises(ValueError, match="norm 'kl' needs an attribute whose cost was measured"):
        compile_gains(Uniform(), "kl", profile([0.0, 1.0]))
    with pytest.raises(ValueError, match="norm must be one of kl, l2, mean, peak, not 'max'"):
        compile_gains(Uniform(), "max", None)
    with pytest.raises(ValueError, match="slices must be an integer"):
        compile_gains(Uniform(), None, None, slices=0)
    steep = CommitmentProfile((0.0, 1.0, 2.0), cost=(1.0, 1e-300))
    with pytest.raises(ValueError, match="too large for a float32"):
        compile_gains(Window(0.5, 1.0), "kl", steep)


@given(length=st.integers(1, 512), slices=st.integers(1, 128))
def test_slice_of_is_the_floor_of_the_exact_quotient(length: int, slices: int) -> None:
    masked = torch.arange(length, -1, -1)
    expected = [min(slices - 1, done * slices // length) for done in range(length + 1)]
    assert slice_of(1 - masked / length, slices).tolist() == expected
    assert slice_of((length - masked) / length, slices).tolist() == expected


def test_a_choice_may_carry_a_norm() -> None:
    assert build_strength({"type": "uniform", "norm": "mean"}) == (Uniform(), "mean")
    assert build_strength("commitment") == (Commitment(), None)
    choice = {"type": "window", "start": 0, "stop": 0.5, "norm": None}
    assert build_strength(choice) == (Window(0.0, 0.5), None)
    assert "norm" in choice
