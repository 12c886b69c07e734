"""Every operator against its formula, one number at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerserve.steering.operators import CODES, NEEDS_SAE, NEUTRAL, PURE_NUMBERS, coefficients


def plain(op: str, s: float, g: float, projection: float, largest: float, activation: float) -> float:
    """The coefficient on v, from the table of operators."""
    match op:
        case "add":
            return g * s
        case "boost":
            return g * s * largest
        case "multiply":
            return g * (s - 1) * activation
        case "clamp":
            return g * (s - projection)
        case "project_out":
            return -g * s * projection
        case "cap":
            return g * (s - projection) if projection > s else 0.0
        case _:
            return 0.0


NUMBERS = st.floats(-8, 8, width=32)
PUSHES = st.tuples(st.sampled_from(sorted(CODES)), NUMBERS, st.floats(0, 4, width=32))
MOMENTS = st.tuples(NUMBERS, st.floats(0, 8, width=32), st.floats(0, 8, width=32))


@given(pushes=st.lists(PUSHES, min_size=1, max_size=6), moments=st.lists(MOMENTS, min_size=1, max_size=5))
def test_coefficients_follow_the_formulas(
    pushes: list[tuple[str, float, float]], moments: list[tuple[float, float, float]]
) -> None:
    code = torch.tensor([[CODES[op] for op, _, _ in pushes]])
    strength = torch.tensor([[s for _, s, _ in pushes]])
    gain = torch.tensor([[g for _, _, g in pushes]])
    each = torch.tensor(moments).T[:, None, None, :].expand(3, 1, len(pushes), len(moments))
    got = coefficients(code, strength, gain, *each)
    want = [[plain(op, s, g, *moment) for moment in moments] for op, s, g in pushes]
    torch.testing.assert_close(got[0], torch.tensor(want), atol=1e-5, rtol=1e-5)


@given(strength=NUMBERS, moment=MOMENTS, op=st.sampled_from(sorted(CODES)))
def test_no_gain_is_no_push(strength: float, moment: tuple[float, float, float], op: str) -> None:
    values = [torch.full((1, 1, 1), value) for value in moment]
    got = coefficients(torch.tensor([[CODES[op]]]), torch.tensor([[strength]]), torch.zeros(1, 1), *values)
    assert float(got) == 0.0


@pytest.mark.parametrize("op", [op for op in CODES if op not in ("clamp", "cap", "read")])
def test_the_neutral_strength_changes_nothing(op: str) -> None:
    values = [torch.full((1, 1, 1), value) for value in (1.5, 2.5, 0.5)]
    neutral = torch.tensor([[NEUTRAL.get(op, 0.0)]])
    assert float(coefficients(torch.tensor([[CODES[op]]]), neutral, torch.ones(1, 1), *values)) == 0.0


def test_operators_that_read_an_sae_take_a_factor() -> None:
    assert NEEDS_SAE <= PURE_NUMBERS <= set(CODES)
    assert set(NEUTRAL) <= PURE_NUMBERS
