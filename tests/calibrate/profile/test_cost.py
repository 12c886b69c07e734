"""Cost matrices over progress: sums that are nats a token, whatever the grid, and matrices that are costs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from schedulers.joint_profile import check_cost
from steerserve.calibrate.generation import GeneratedText
from steerserve.calibrate.profile.canvases import Canvases, canvases_by_slice
from steerserve.calibrate.profile.cost import FLOOR, RIDGE, assemble, canvas_means, check, joint
from steerserve.calibrate.profile.fisher import PushedPredictions
from tests.calibrate.made import family
from tests.calibrate.profile.test_fisher import attributes, canvases


def matrix(seed: int, size: int = 3) -> Tensor:
    half = torch.randn(size, size + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half @ half.T


def test_a_cost_that_is_the_same_everywhere_sums_to_itself() -> None:
    one = matrix(0)
    for slices in (1, 5, 64):
        cost = assemble({k: [one.tolist()] * 2 for k in range(slices)}, slices)
        torch.testing.assert_close(cost.matrices.sum(0), one)
        torch.testing.assert_close(cost.of(1), one[1, 1].expand(slices) / slices)
        assert cost.ridge == 0 and float(cost.errors.max()) == 0


def test_the_first_slices_are_as_measured_and_the_others_means_of_their_neighbours() -> None:
    several = [matrix(k) for k in range(20)]
    cost = assemble({k: [one.tolist()] for k, one in enumerate(several)}, 20)
    for k, width in ((0, 0), (3, 0), (4, 1), (9, 2), (16, 3), (17, 2), (19, 0)):
        wanted = torch.stack(several[k - width : k + width + 1]).mean(0) / 20
        torch.testing.assert_close(cost.matrices[k], wanted)


def test_slices_that_no_run_was_in_lie_between_their_neighbours() -> None:
    cost = assemble({0: [[[4.0]]], 3: [[[1.0]]]}, 6)
    # The fourth and last slices are further means; slices / 4 is 0 before.
    assert cost.of(0)[:4].mul(6).tolist() == pytest.approx([4, 3, 2, 1])
    assert cost.of(0)[5] * 6 == pytest.approx(1)


def test_errors_are_those_of_the_mean_over_canvases() -> None:
    draws = np.random.default_rng(2).exponential(size=(64, 400))
    known = {k: [[[float(value)]] for value in draws[k]] for k in range(64)}
    error = assemble(known, 64).errors[:, 0] * 64
    assert float(error[0]) == pytest.approx(draws[0].std(ddof=1) / 20)
    assert float(error[32]) == pytest.approx(np.sqrt((draws[28:37].var(axis=1, ddof=1) / 400).sum()) / 9)


def test_attributes_that_push_the_same_way_still_have_a_cost() -> None:
    one = [[2.0, 4.0, 0.0], [4.0, 8.0, 0.0], [0.0, 0.0, 0.0]]
    cost = assemble({0: [one], 1: [one]}, 2)
    assert cost.ridge == pytest.approx(RIDGE)
    check_cost(cost.matrices)
    assert float(cost.of(2).min()) == pytest.approx(FLOOR, rel=1e-5)
    profile = joint(("a", "b", "c"), [[1.0, 2.0]] * 3, cost)
    assert profile.slices == 2 and profile.cost[0][0][1] == pytest.approx(2.0)


def test_what_is_kept_of_a_slice_is_the_mean_over_each_canvas() -> None:
    model = family("bert")
    some = canvases(model)
    predictions = PushedPredictions(model, attributes(model), some, 1.0)
    fisher = predictions.fisher()
    kept = torch.tensor(canvas_means(predictions), dtype=torch.float64)
    assert kept.shape == (4, 3, 3)
    torch.testing.assert_close(kept[2], fisher[some.row == 2].mean(0))
    torch.testing.assert_close(kept, kept.mT, rtol=1e-6, atol=1e-9)


def run_canvases(length: int) -> dict[int, Canvases]:
    random = np.random.default_rng(4)
    runs = [
        GeneratedText("", tuple(random.integers(5, 40, length).tolist()), tuple(random.permutation(length).tolist()))
        for _ in range(3)
    ]
    return canvases_by_slice(runs, family("bert").facts, length, count=3, positions=length, seed=0)


def test_a_small_uniform_push_costs_its_sum_in_nats_a_token() -> None:
    # By the chain rule, along whole unsteered runs: one token commits at each of `length` states.
    length, model = 12, family("bert")
    pushed = attributes(model)
    along = run_canvases(length)
    total = assemble({k: canvas_means(PushedPredictions(model, pushed, one, 1.0)) for k, one in along.items()}, length)
    push = torch.tensor([0.3, 0.2, -0.1])
    form = float(push.double() @ total.matrices.sum(0) @ push.double()) / 2
    size = (1e-3 / form) ** 0.5
    nats = 0.0
    for k in range(length):
        exact = PushedPredictions(model, pushed, along[k], 1.0).kl([size * push, -size * push]).mean(0)
        nats += float(np.mean([float(exact[along[k].row == i].mean()) for i in range(3)])) / length
    # The smoothing moves cost between slices near the end, where few positions are left.
    assert nats / (size**2 * form) == pytest.approx(1, rel=0.1)


def test_the_check_compares_both_ways_of_measuring() -> None:
    model = family("bert")
    pushed, along = attributes(model), run_canvases(12)
    total = assemble({k: canvas_means(PushedPredictions(model, pushed, one, 1.0)) for k, one in along.items()}, 12)
    found = check(lambda some: PushedPredictions(model, pushed[1:2], some, 1.0), along, float(total.of(1).sum()), 0.05)
    assert found["exact_over_fisher"] == pytest.approx(1, rel=0.03)
    assert found["doubling"] == pytest.approx(1, rel=0.1)
    assert found["at_strength"] == pytest.approx(1, rel=0.3)
    assert found["kl"] == pytest.approx(1e-3, rel=0.5) and found["canvases"] == 6
