"""Every operator against its formula, one number at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerserve.steering.names import NEUTRAL, OPERATORS
from steerserve.steering.operators import CODES, NEEDS_SAE, PURE_NUMBERS, SETS_LATENT, coefficients


def plain(op: str, s: float, g: float, value: float, scale: float) -> float:
    """The coefficient on v, from the table of operators."""
    match op:
        case "add":
            return g * s * scale
        case "boost":
            return g * s * value * scale
        case "multiply":
            return g * (s - 1) * value * scale
        case "clamp":
            return g * (s - value) * scale
        case "project_out":
            return -g * s * value * scale
        case "cap":
            return g * (s - value) * scale if value > s else 0.0
        case _:
            return 0.0


NUMBERS = st.floats(-8, 8, width=32)
PUSHES = st.tuples(st.sampled_from(sorted(CODES)), NUMBERS, st.floats(0, 4, width=32))


@given(
    pushes=st.lists(PUSHES, min_size=1, max_size=6),
    values=st.lists(NUMBERS, min_size=1, max_size=5),
    scale=st.sampled_from([None, 0.5, 3.0]),
)
def test_coefficients_follow_the_formulas(
    pushes: list[tuple[str, float, float]], values: list[float], scale: float | None
) -> None:
    code = torch.tensor([[CODES[op] for op, _, _ in pushes]])
    strength = torch.tensor([[s for _, s, _ in pushes]])
    gain = torch.tensor([[g for _, _, g in pushes]])
    value = torch.tensor(values).expand(1, len(pushes), len(values))
    scales = None if scale is None else torch.full((1, len(pushes)), scale)
    got = coefficients(code, strength, gain, value, scales)
    want = [[plain(op, s, g, one, scale or 1.0) for one in values] for op, s, g in pushes]
    torch.testing.assert_close(got[0], torch.tensor(want), atol=1e-4, rtol=1e-5)


@given(strength=NUMBERS, value=NUMBERS, op=st.sampled_from(sorted(CODES)))
def test_no_gain_is_no_push(strength: float, value: float, op: str) -> None:
    read = torch.full((1, 1, 1), value)
    got = coefficients(torch.tensor([[CODES[op]]]), torch.tensor([[strength]]), torch.zeros(1, 1), read)
    assert float(got) == 0.0


@pytest.mark.parametrize("op", NEUTRAL)
def test_the_neutral_strength_changes_nothing(op: str) -> None:
    value = torch.full((1, 1, 1), 1.5)
    neutral = torch.tensor([[NEUTRAL[op]]])
    assert float(coefficients(torch.tensor([[CODES[op]]]), neutral, torch.ones(1, 1), value)) == 0.0


def test_operators_that_read_an_sae_take_a_factor() -> None:
    assert NEEDS_SAE <= PURE_NUMBERS <= set(CODES)
    assert {*NEUTRAL} | SETS_LATENT == {*OPERATORS}
