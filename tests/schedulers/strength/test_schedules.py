"""Every strength schedule against a plain reading of its rule."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedulers import CommitmentProfile, build_strength
from schedulers.strength import PRESETS, Commitment, Piecewise, Uniform, Window

GRID = st.integers(1, 70)
SHARES = st.integers(0, 100).map(lambda i: i / 100)
CURVES = st.lists(st.integers(-50, 50).map(lambda i: i / 10), min_size=2, max_size=40)
PARTS = 400


def mean_over_slices(gain: Callable[[float], float], slices: int) -> list[float]:
    """The mean of a gain over each slice, by adding up many thin strips."""
    means = []
    for i in range(slices):
        total = 0.0
        for j in range(PARTS):
            total += gain((i + (j + 0.5) / PARTS) / slices)
        means.append(total / PARTS)
    return means


@given(slices=GRID)
def test_uniform_is_one_everywhere(slices: int) -> None:
    assert Uniform().shape(slices, None).tolist() == [1.0] * slices


@given(borders=st.tuples(SHARES, SHARES).filter(lambda b: b[0] < b[1]), slices=st.integers(1, 20))
def test_a_window_is_one_in_every_slice_that_it_lies_in(borders: tuple[float, float], slices: int) -> None:
    start, stop = borders
    inside = mean_over_slices(lambda p: 1.0 if start <= p < stop else 0.0, slices)
    assert Window(start, stop).shape(slices, None).tolist() == [1.0 if mean > 0 else 0.0 for mean in inside]


@given(first=st.integers(0, 99), width=st.integers(1, 100))
def test_window_on_slice_borders_is_exactly_one_inside_and_zero_outside(first: int, width: int) -> None:
    last = min(100, first + width)
    gains = Window(first / 100, last / 100).shape(100, None).tolist()
    assert gains == [1.0 if first <= i < last else 0.0 for i in range(100)]


def plain_line(points: list[tuple[float, float]], progress: float) -> float:
    if progress <= points[0][0]:
        return points[0][1]
    for (p0, g0), (p1, g1) in zip(points, points[1:], strict=False):
        if progress <= p1:
            return g0 + (g1 - g0) * (progress - p0) / (p1 - p0)
    return points[-1][1]


@given(
    at=st.lists(SHARES, min_size=2, max_size=6, unique=True),
    gains=st.lists(st.floats(0.1, 3), min_size=6, max_size=6),
    slices=st.integers(1, 12),
)
def test_piecewise_is_the_mean_of_the_lines_over_each_slice(at: list[float], gains: list[float], slices: int) -> None:
    points = list(zip(sorted(at), gains, strict=False))
    expected = mean_over_slices(lambda p: plain_line(points, p), slices)
    assert Piecewise(tuple(points)).shape(slices, None).tolist() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("preset", "rule"),
    [
        ("ramp_up", lambda p: p),
        ("ramp_down", lambda p: 1 - p),
        ("cosine_down", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("cosine_up", lambda p: (1 - math.cos(math.pi * p)) / 2),
    ],
)
def test_presets_draw_what_they_are_named_for(preset: str, rule: Callable[[float], float]) -> None:
    schedule, norm = build_strength({"type": "piecewise", "preset": preset})
    assert norm is None
    assert schedule == Piecewise(preset=preset)
    assert schedule.shape(64, None).tolist() == pytest.approx(mean_over_slices(rule, 64), abs=1e-3)


def test_every_preset_is_tested_and_valid_as_points() -> None:
    assert sorted(PRESETS) == ["cosine_down", "cosine_up", "ramp_down", "ramp_up"]
    for points in PRESETS.values():
        assert Piecewise(points).knots == points


def plain_commitment(curve: list[float], blocks: int, gate: float, slices: int) -> list[float]:
    def h(progress: float) -> float:
        return plain_line([(i / (len(curve) - 1), value) for i, value in enumerate(curve)], progress)

    rises = [max(0.0, h((b + 1) / blocks) - h(b / blocks)) for b in range(blocks)]
    rises = [rise if rise > 1e-9 else 0.0 for rise in rises]
    total = sum(rises)
    kept = [rise / total if total > 0 and rise / total >= gate else 0.0 for rise in rises]
    if not any(kept):
        return [1.0] * slices
    return mean_over_slices(lambda p: kept[int(p * blocks)], slices)


@given(curve=CURVES, blocks=st.integers(1, 12), gate=st.sampled_from([0.0, 0.0217, 0.11, 0.313]), slices=GRID)
def test_commitment_follows_the_block_fractions(curve: list[float], blocks: int, gate: float, slices: int) -> None:
    profile = CommitmentProfile(tuple(curve))
    rises = profile.rises(blocks)
    fractions = profile.fractions(blocks)
    if bool(((rises > 0) & (rises < 1e-6)).any()) or bool(((fractions - gate).abs() < 1e-6).any()):
        return  # a rise, or a fraction at the gate, that is only rounding
    expected = plain_commitment(curve, blocks, gate, slices)
    assert Commitment(blocks, gate).shape(slices, profile).tolist() == pytest.approx(expected, abs=0.02)


@given(slope=st.floats(0.1, 5), blocks=st.integers(1, 32), slices=GRID)
def test_commitment_of_a_steady_rise_is_flat(slope: float, blocks: int, slices: int) -> None:
    profile = CommitmentProfile(tuple(slope * i for i in range(33)))
    gains = Commitment(blocks).shape(slices, profile)
    assert gains.tolist() == pytest.approx([1 / blocks] * slices)
    assert Commitment(blocks).note(profile) is None


@given(curve=CURVES.map(lambda values: sorted(values, reverse=True)), blocks=st.integers(1, 32), slices=GRID)
def test_commitment_of_what_never_forms_is_uniform_and_says_so(curve: list[float], blocks: int, slices: int) -> None:
    profile = CommitmentProfile(tuple(curve))
    assert Commitment(blocks).shape(slices, profile).tolist() == [1.0] * slices
    assert "rises over none of the" in str(Commitment(blocks).note(profile))


def test_commitment_is_zero_below_the_gate_and_kept_at_it() -> None:
    profile = CommitmentProfile((0.0, 0.5, 0.75, 1.0))
    assert Commitment(3, 0.25).shape(3, profile).tolist() == [0.5, 0.25, 0.25]
    assert Commitment(3, 0.26).shape(3, profile).tolist() == [0.5, 0.0, 0.0]


def test_commitment_with_everything_below_the_gate_is_uniform_and_says_so() -> None:
    profile = CommitmentProfile((0.0, 1.0, 2.0))
    assert Commitment(2, 0.6).shape(4, profile).tolist() == [1.0] * 4
    assert "below the gate 0.6" in str(Commitment(2, 0.6).note(profile))


def test_commitment_without_a_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a commitment profile"):
        Commitment().shape(8, None)
