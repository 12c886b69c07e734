"""The layers of a batch: each with its own site, and what its pushes did told once."""

from dataclasses import replace

import torch

from steerserve.steering.plan import SteeringPlan
from tests.steering.pushes import hidden, push, scopes


def test_flushing_twice_counts_once() -> None:
    one = push()
    plan = SteeringPlan([[one]])
    plan.set_step(torch.zeros(1, dtype=torch.float64), scopes(1))
    plan(1, hidden(1))
    plan.count()
    plan.flush()
    first = replace(one.applied, gains=list(one.applied.gains))
    plan.flush()
    assert (first.positions, first.steps, first.gains) == (12, 1, [1.0])
    assert one.applied == first


def test_layers_without_a_push_and_steps_without_a_gain_are_left_alone() -> None:
    h = hidden(2)
    plan = SteeringPlan([[push(gains=torch.tensor([1.0, 0.0]))], []])
    plan.set_step(torch.tensor([0.0, 0.0], dtype=torch.float64), scopes(2))
    assert plan(0, h) is h
    assert plan(2, h) is h
    assert not torch.equal(plan(1, h)[0], h[0])
    plan.set_step(torch.tensor([0.5, 0.0], dtype=torch.float64), scopes(2))
    assert plan(1, h) is h


def test_an_empty_plan_touches_nothing() -> None:
    h = hidden(1)
    plan = SteeringPlan([[]])
    plan.set_step(torch.zeros(1, dtype=torch.float64), scopes(1))
    assert plan(0, h) is h
    assert plan.readings() == {}
    plan.flush()


def test_layers_of_one_row_are_pushed_each_at_its_own() -> None:
    h = hidden(1)
    low, high = push(seed=1, layer=0), push(seed=2, layer=2, strength=-4.0)
    plan = SteeringPlan([[low, high]])
    plan.set_step(torch.zeros(1, dtype=torch.float64), scopes(1))
    inside = scopes(1)[0, 0]
    torch.testing.assert_close(plan(0, h)[0, inside], h[0, inside] + 1.5 * low.direction)
    torch.testing.assert_close(plan(2, h)[0, inside], h[0, inside] - 4.0 * high.direction)
    assert torch.equal(plan(0, h)[0, ~inside], h[0, ~inside])


def test_captured_layers_are_kept_as_they_arrive() -> None:
    h = hidden(1)
    plan = SteeringPlan([[push()]], captures=frozenset({1, 2}))
    plan.set_step(torch.zeros(1, dtype=torch.float64), scopes(1))
    plan(0, h)
    plan(1, h)
    assert set(plan.captured) == {1}
    assert plan.captured[1] is h
