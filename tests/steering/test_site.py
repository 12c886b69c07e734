"""What a site does to a layer's output against a plain loop over rows, pushes and positions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerserve.saes.pair import SaePair
from steerserve.saes.sae import LEAST_OWN
from steerserve.steering.operators import CODES, READS_LATENT
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import SCOPES, Applied, Push
from tests import tiny
from tests.steering.pushes import LENGTH, SAE, gain_at, hidden, of_feature, push, scopes, touched


def coefficient(one: Push, h: Tensor, gain: float) -> float:
    """The operators' formulas in float64, and the bound on what sets a feature's latent."""
    asked = formula(one, h, gain)
    if one.feature is None or one.op not in ("multiply", "clamp", "cap"):
        return asked
    most = 10 * float(h.double().norm())
    return min(max(asked, -most), most)


def formula(one: Push, h: Tensor, gain: float) -> float:
    h, v, s = h.double(), one.direction.double(), one.strength
    projection, per = float(h @ v), 1.0
    if one.feature is not None and one.op in READS_LATENT:
        column, row = SAE.W_enc[:, one.feature].double(), SAE.W_dec[one.feature].double()
        activations = SAE.encode(h.float()).double()
        largest, own, norm = float(activations.max()), float(activations[one.feature]), float(row.norm())
        product = float(column @ row)
        per = norm / product if product >= LEAST_OWN else norm
        projection = own
        if one.op == "clamp" and s > 0 and product >= LEAST_OWN:
            projection = float((h - SAE.b_dec.double()) @ column + SAE.b_enc[one.feature].double())
    match one.op:
        case "add":
            return gain * s
        case "boost":
            return gain * s * largest * norm
        case "multiply":
            return gain * (s - 1) * own * per
        case "clamp":
            return gain * (s - projection) * per
        case "project_out":
            return -gain * s * projection
        case "cap":
            return gain * (s - projection) * per if projection > s else 0.0
        case _:
            return 0.0


def reference(
    rows: list[list[Push]], h: Tensor, progress: list[float], scope: Tensor, changed: Tensor | None = None
) -> tuple[Tensor, dict[int, list[list[float]]]]:
    """What a layer's output becomes, and for each push the |delta|/|h| of each position it moved, step by step; where
    rounding or another push has not left it as it was, which changed [rows, length] says."""
    out, ratios = h.double().clone(), {}
    for r, pushes in enumerate(rows):
        for one in pushes:
            moved = []
            for position in range(LENGTH):
                if not touched(one, r, position, scope):
                    continue
                weight = coefficient(one, h[r, position], gain_at(one, progress[r]))
                out[r, position] += weight * one.direction.double()
                if weight != 0 and (changed is None or changed[r, position]):
                    moved.append(abs(weight) / float(h[r, position].double().norm()))
            ratios[id(one)] = [moved]
    return out, ratios


OPS = [op for op in CODES if op != "read"]
SCOPE_CHOICES: list[str | tuple[int, int]] = [*SCOPES, (5, 9), (0, LENGTH), (4, 5)]


@pytest.mark.parametrize("scope", SCOPE_CHOICES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_operator_in_every_scope(op: str, scope: str | tuple[int, int]) -> None:
    h, areas = hidden(4), scopes(4)
    rows = [[push(op, 0.8, seed=1, scope=scope)], [push(op, -1.7, seed=2, scope=scope)]]
    rows += [[of_feature(op, 0.8, 1, scope=scope)], [of_feature(op, -1.7, 2, scope=scope)]]
    plan = SteeringPlan(rows)
    plan.set_step(torch.tensor([0.3, 0.9, 0.3, 0.9], dtype=torch.float64), areas)
    want, _ = reference(rows, h, [0.3, 0.9, 0.3, 0.9], areas)
    torch.testing.assert_close(plan(1, h).double(), want, atol=2e-5, rtol=2e-5)


@st.composite
def batches(draw: st.DrawFn) -> list[list[Push]]:
    def one() -> Push:
        op, strength = draw(st.sampled_from(list(CODES))), draw(st.floats(-3, 3, width=32, allow_subnormal=False))
        seed = draw(st.integers(0, 9))
        changes: dict[str, Any] = {
            "scope": draw(st.sampled_from(SCOPE_CHOICES)),
            "gains": torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=1, max_size=5))),
        }
        if draw(st.booleans()):
            return of_feature(op, strength, seed, **changes)
        return push(op, strength, seed, **changes)

    rows = [[one() for _ in range(draw(st.integers(0, 3)))] for _ in range(draw(st.integers(1, 4)))]
    return rows if any(rows) else [[one()], *rows]


@settings(max_examples=60)
@given(rows=batches(), data=st.data())
def test_any_mix_in_one_batch_over_several_steps(rows: list[list[Push]], data: st.DataObject) -> None:
    areas = scopes(len(rows))
    plan = SteeringPlan(rows)
    totals: dict[int, list[list[float]]] = {id(one): [] for row in rows for one in row}
    gains: dict[int, list[float]] = {id(one): [] for row in rows for one in row}
    for step in range(3):
        progress = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.6, 1.0]), min_size=len(rows), max_size=len(rows)))
        h = hidden(len(rows), seed=step)
        plan.set_step(torch.tensor(progress, dtype=torch.float64), areas)
        got = plan(1, h)
        plan.count()
        want, ratios = reference(rows, h, progress, areas, (got != h).any(2))
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)
        for r, row in enumerate(rows):
            for one in row:
                gains[id(one)].append(gain_at(one, progress[r]))
            if not row:
                assert torch.equal(got[r], h[r])
        for key, moved in ratios.items():
            totals[key] += moved
    plan.flush()
    for one in (one for row in rows for one in row):
        steps = totals[id(one)]
        every = [ratio for step_ratios in steps for ratio in step_ratios]
        assert one.applied.gains == gains[id(one)]
        assert one.applied.positions == len(every)
        assert one.applied.missed == 0
        assert one.applied.steps == sum(1 for step_ratios in steps if step_ratios)
        assert one.applied.ratio_sum == pytest.approx(sum(every), rel=1e-4, abs=1e-6)
        assert one.applied.ratio_max == pytest.approx(max(every, default=0.0), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("make", [push, of_feature], ids=["direction", "feature"])
@pytest.mark.parametrize("op", [*OPS, "read"])
def test_a_row_is_steered_alike_in_any_batch(op: str, make: Callable[..., Push]) -> None:
    """Bit for bit: beside other rows, more pushes, and on a wider canvas."""
    h, areas = hidden(6), scopes(6)
    mine = make(op, 0.7, 3, scope="response")
    others = [[make(one, 1.3, i) for one in OPS[: i + 1]] for i in range(5)]
    together, alone = SteeringPlan([[mine], *others]), SteeringPlan([[replace(mine, applied=Applied())]])
    together.set_step(torch.full((6,), 0.5, dtype=torch.float64), areas)
    alone.set_step(torch.full((1,), 0.5, dtype=torch.float64), areas[:1])
    assert torch.equal(together(1, h)[0], alone(1, h[:1])[0])
    if op == "read":
        assert together.readings()[id(mine)] == next(iter(alone.readings().values()))


def test_pushes_at_one_site_all_read_the_state_as_it_arrived() -> None:
    h = hidden(1)
    first, second = push("clamp", 2.0, seed=1), push("clamp", 2.0, seed=1)
    plan = SteeringPlan([[first, second]])
    plan.set_step(torch.zeros(1, dtype=torch.float64), scopes(1))
    got = plan(1, h)[0, 0] @ first.direction
    projection = h[0, 0] @ first.direction
    torch.testing.assert_close(got, projection + 2 * (2.0 - projection))


def test_a_reading_is_the_mean_projection_over_its_scope_and_changes_nothing() -> None:
    h, areas = hidden(2), scopes(2)
    reads = [push("read", 0.0, seed=4, scope="response"), push("read", 0.0, seed=5, scope="masked")]
    plan = SteeringPlan([[push(seed=1), reads[0]], [reads[1]]])
    plan.set_step(torch.zeros(2, dtype=torch.float64), areas)
    got = plan(1, h)
    assert torch.equal(got[1], h[1])
    values = plan.readings()
    assert set(values) == {id(one) for one in reads}
    for r, one in enumerate(reads):
        positions = [p for p in range(LENGTH) if touched(one, r, p, areas)]
        want = sum(float(h[r, p] @ one.direction) for p in positions) / len(positions)
        assert values[id(one)] == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_reading_over_no_position_is_zero() -> None:
    one = push("read", 0.0, scope="masked")
    plan = SteeringPlan([[one]])
    plan.set_step(torch.ones(1, dtype=torch.float64), torch.zeros(1, 5, LENGTH, dtype=torch.bool))
    plan(1, hidden(1))
    assert plan.readings() == {id(one): 0.0}


def test_boost_takes_its_size_from_the_sae_of_each_tokens_state() -> None:
    pair = SaePair(SAE, tiny.sae(1, seed=9, policy="visible"))
    h, areas, strength = hidden(2), scopes(2), 0.8
    rows = [[push("boost", strength, seed=1, pair=pair)], [push("boost", strength, seed=1)]]
    plan = SteeringPlan(rows)
    plan.set_step(torch.zeros(2, dtype=torch.float64), areas)
    moved = plan(1, h) - h
    for position in range(12):
        masked = bool(areas[0, SCOPES["masked"], position])
        largest = (pair.mask if masked else pair.visible).encode(h[0, position]).max()
        torch.testing.assert_close(
            moved[0, position], strength * largest * SAE.row_norm(2) * rows[0][0].direction, atol=1e-4, rtol=1e-4
        )
        alone = strength * SAE.encode(h[1, position]).max() * SAE.row_norm(2) * rows[1][0].direction
        torch.testing.assert_close(moved[1, position], alone, atol=1e-4, rtol=1e-4)
