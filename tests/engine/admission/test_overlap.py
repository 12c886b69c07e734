"""Overlaps of interventions, against cosines computed one pair at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerserve.engine.admission.interventions.resolve import overlaps
from steerserve.engine.request.intervention import Resolved
from steerserve.steering.push import Push


def resolved(*directions: Tensor) -> Resolved:
    gains = torch.ones(4)
    pushes = [Push(layer, direction, "add", 1.0, gains) for layer, direction in enumerate(directions)]
    return Resolved({}, tuple(pushes))


def unit(*values: float) -> Tensor:
    vector = torch.tensor(values)
    return vector.div(vector.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 1000))
def test_the_largest_cosine_over_all_layers(layers: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = [[unit(*torch.randn(5, generator=generator).tolist()) for _ in range(count)] for count in layers]
    found = overlaps([resolved(*one) for one in directions])
    for i, mine in enumerate(directions):
        for j, other in enumerate(directions):
            expected = max((abs(cosine(a, b)) for a in mine for b in other), default=0.0)
            assert found[i][j] == pytest.approx(expected, abs=1e-6)


def test_opposite_directions_overlap_fully_at_whatever_layer() -> None:
    right, up = unit(1.0, 0.0), unit(0.0, 1.0)
    _, same, across = overlaps([resolved(right), resolved(up, -right), resolved(up)])[0]
    assert same == pytest.approx(1.0)
    assert across == pytest.approx(0.0)
