"""Bounds hold for the very change that is added to a state, and for each row as it would alone."""

import pytest
import torch

from steerserve.steering.bounds import Bound, Bounds

ROWS, PUSHES, LENGTH, SIZE = 5, 3, 7, 64


def made(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    directions = torch.randn(ROWS, PUSHES, SIZE, generator=generator)
    directions = (directions / directions.norm(dim=2, keepdim=True)).to(dtype)
    weight = torch.randn(ROWS, PUSHES, LENGTH, generator=generator)
    return weight, directions, torch.randn(ROWS, LENGTH, SIZE, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_the_sum_that_is_added(dtype: torch.dtype) -> None:
    weight, directions, state = made(dtype)
    bounds = Bounds([[Bound(9.0, refuse=True)] * PUSHES] * ROWS, PUSHES, torch.device("cpu"))
    bounds.hold(weight, directions, state)
    for row in range(ROWS):
        added = weight[row, 0, :, None].to(dtype) * directions[row, 0]
        for p in range(1, PUSHES):
            added = added + weight[row, p, :, None].to(dtype) * directions[row, p]
        ratios = added.float().norm(dim=1) / state[row].float().norm(dim=1)
        assert float(bounds.found[row]) == float(ratios.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_held_alike_alone_and_beside_others(dtype: torch.dtype) -> None:
    weight, directions, state = made(dtype)
    one = [Bound(0.05)] * PUSHES
    together, smaller = Bounds([one] * ROWS, PUSHES, torch.device("cpu")).hold(weight, directions, state)
    assert smaller.any()
    for row in range(ROWS):
        alone = Bounds([one], PUSHES, torch.device("cpu"))
        mine, cut = alone.hold(weight[row : row + 1], directions[row : row + 1], state[row : row + 1])
        assert torch.equal(mine[0], together[row])
        assert torch.equal(cut[0], smaller[row])
