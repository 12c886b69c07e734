"""Rows that share a forward: as cheap as can be, and the same states as in one forward of all."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.forward.packing import TILE, PackedForward, positions, share
from steerserve.models import DiffusionLM
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import SCOPES, Push
from tests import tiny

WIDTHS = st.lists(st.integers(1, 9).map(lambda tiles: tiles * 16), min_size=1, max_size=4)


def cost(groups: list[list[int]], widths: list[int], overhead: int) -> int:
    return sum(len(group) * max(widths[row] for row in group) + overhead for group in groups)


@given(WIDTHS, st.integers(0, 100))
def test_no_other_grouping_costs_less(widths: list[int], overhead: int) -> None:
    groups = share(widths, overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(widths)))
    assert all(group == sorted(group) for group in groups)
    everything = itertools.product(range(len(widths)), repeat=len(widths))
    made = ([[i for i, at in enumerate(places) if at == group] for group in set(places)] for places in everything)
    least = min(cost(one, widths, overhead) for one in made)
    assert cost(groups, widths, overhead) == least


def test_rows_alike_share_one_forward() -> None:
    assert share([32] * 5, 16) == [[0, 1, 2, 3, 4]]


def test_a_long_row_does_not_widen_the_others() -> None:
    assert share([32, 400, 32, 32], 16) == [[0, 2, 3], [1]]


def pushes(row: int) -> list[Push]:
    direction = torch.nn.functional.normalize(
        torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(row)), dim=0
    )
    return [Push(1, direction, "add", 3.0, torch.ones(4)), Push(2, direction, "read", 0.0, torch.zeros(4))]


@pytest.mark.parametrize("build", [tiny.bert, tiny.llada, tiny.dream])
@torch.inference_mode()
def test_states_are_those_of_one_forward_bit_for_bit(build: type[DiffusionLM]) -> None:
    model = build(3)
    lengths, width = [17, 80, 20, 5, 79, 33], 80
    rows = [pushes(i) if i % 2 else [] for i in range(len(lengths))]
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(5, tiny.VOCAB, (len(lengths), width), generator=generator)
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    scopes = inside[:, None].expand(-1, len(SCOPES), -1)
    progress = torch.zeros(len(lengths), dtype=torch.float64)
    packed = PackedForward(rows, lengths, width, torch.device("cpu"), torch.float32, frozenset({1}))
    assert len(packed.parts) > 1 and {part.width % TILE for part in packed.parts} != {0}
    packed.set_step(progress, scopes)
    got = packed.forward(model, canvas, None)
    plan = SteeringPlan(rows, captures=frozenset({1}))
    plan.set_step(progress, scopes)
    whole = model(canvas, torch.tensor(lengths), plan)
    assert torch.equal(got[inside], whole[inside])
    assert torch.equal(packed.captured[1][inside], plan.captured[1][inside])
    assert packed.plans.readings() == plan.readings()
    reads = [push for row in rows for push in row if push.op == "read"]
    assert all(torch.equal(packed.plans.projections(one)[:5], plan.projections(one)[:5]) for one in reads)
    packed.plans.count()
    packed.plans.flush()
    applied = [push.applied.positions for row in rows for push in row if push.op == "add"]
    assert applied == [length for i, length in enumerate(lengths) if i % 2]


@pytest.mark.parametrize("last", ["nothing", "push", "capture"])
@torch.inference_mode()
def test_states_that_are_asked_for_are_those_of_the_whole_forward(last: str) -> None:
    model, width, lengths = tiny.llada(3), 80, [33, 80, 20, 76]
    generator = torch.Generator().manual_seed(1)
    layer = model.facts.num_layers - 1
    direction = torch.nn.functional.normalize(torch.randn(tiny.HIDDEN, generator=generator), dim=0)
    push = Push(layer, direction, "add", 3.0, torch.ones(4))
    rows = [[push] if last == "push" and i == 1 else [] for i in range(len(lengths))]
    captures = frozenset({layer}) if last == "capture" else frozenset[int]()
    canvas = torch.randint(5, tiny.VOCAB, (len(lengths), width), generator=generator)
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    asked = inside & (torch.rand(inside.shape, generator=generator) < 0.2)
    packed = PackedForward(rows, lengths, width, torch.device("cpu"), torch.float32, captures)
    packed.set_step(torch.zeros(len(lengths), dtype=torch.float64), inside[:, None].expand(-1, len(SCOPES), -1))
    whole = packed.forward(model, canvas, None)
    got = packed.forward(model, canvas, None, asked)
    assert torch.equal(got[asked], whole[asked])
    # Elsewhere nothing was computed, but of rows beside which the last layer's output is changed or read everywhere.
    full = torch.equal(got[1], whole[1])
    assert full == (last != "nothing")
    packed.plans.count()
    packed.plans.flush()
    assert push.applied.positions == (80 if last == "push" else 0)


def test_positions_that_are_asked_for_come_once_and_first() -> None:
    asked = torch.zeros(3, 40, dtype=torch.bool)
    asked[0, 5:23] = asked[1, 39] = True
    got = positions(asked)
    assert got is not None and got.shape == (3, 32)
    assert got[0, :18].tolist() == list(range(5, 23)) and got[1, 0] == 39
    assert all(len(set(row)) == 32 for row in got.tolist())
    assert positions(asked[:, 4:24]) is None
