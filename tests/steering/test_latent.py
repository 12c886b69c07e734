"""What an encoder reads of a feature after a push that sets it: the value asked for, under every activation."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steerserve.saes import FeatureStats, SaeFacts, SparseAutoencoder
from steerserve.saes.activation import AbsTopK, Activation, GroupMax, JumpRelu, Relu, TopK
from steerserve.saes.layouts.fold import gated
from steerserve.saes.matching_pursuit import MatchingPursuitAutoencoder, Pursuit
from steerserve.saes.sae import LEAST_OWN
from steerserve.steering.bounds import LARGEST_LATENT
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Applied, Push
from tests import tiny
from tests.steering.pushes import LENGTH, hidden, of_feature, push

FEATURES = tiny.FEATURES
ASKED = (0.0, 2.5, 5.0, 10.0)


def weights(seed: int = 0) -> dict[str, Tensor]:
    """An encoder that reads its own rows, 0.4 to 1.2 of them, among others; rows 0.5 to 2 long."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(FEATURES, tiny.HIDDEN, generator=generator)
    rows *= (0.5 + 1.5 * torch.rand(FEATURES, 1, generator=generator)) / rows.norm(dim=1, keepdim=True)
    own = 0.4 + 0.8 * torch.rand(FEATURES, generator=generator)
    columns = (rows / rows.square().sum(1, keepdim=True) * own[:, None]).T
    return {
        "W_enc": columns.contiguous(),
        "W_dec": rows,
        "b_enc": -0.2 * torch.rand(FEATURES, generator=generator),
        "b_dec": torch.randn(tiny.HIDDEN, generator=generator) / 4,
    }


def sae_of(activation: Activation, tensors: dict[str, Tensor] | None = None) -> SparseAutoencoder:
    facts = SaeFacts("made", 1, tiny.HIDDEN, FEATURES, "made", "ff" * 32)
    stats = FeatureStats(*(torch.ones(FEATURES) for _ in range(3)))
    return SparseAutoencoder(facts, weights() if tensors is None else tensors, activation, stats)


def gated_sae() -> SparseAutoencoder:
    plain = weights()
    parts = {"b_gate": plain["b_enc"] - 0.1, "b_mag": plain["b_enc"], "r_mag": torch.full((FEATURES,), 0.3)}
    tensors, threshold = gated(plain | parts)
    return sae_of(JumpRelu(threshold), {name: tensors[name] for name in plain})


def pursuit() -> SparseAutoencoder:
    """Over orthogonal unit rows, where a pursuit's order does not matter."""
    rows = torch.linalg.qr(torch.randn(tiny.HIDDEN, tiny.HIDDEN, generator=torch.Generator().manual_seed(3))).Q
    facts = SaeFacts("made", 1, tiny.HIDDEN, tiny.HIDDEN, "matching_pursuit", "ff" * 32)
    return MatchingPursuitAutoencoder(facts, {"W_dec": rows, "b_dec": weights()["b_dec"]}, Pursuit(1e-4, None, False))


SAES: dict[str, Callable[[], SparseAutoencoder]] = {
    "relu": lambda: sae_of(Relu()),
    "topk": lambda: sae_of(TopK(8)),
    "abs_topk": lambda: sae_of(AbsTopK(8)),
    "group_max": lambda: sae_of(GroupMax(8)),
    "batch_topk": lambda: sae_of(JumpRelu(torch.tensor(0.4))),
    "jump_relu": lambda: sae_of(JumpRelu(torch.linspace(0.1, 0.6, FEATURES))),
    "gated": gated_sae,
}


def pushed(one: Push, states: Tensor) -> Tensor:
    """states [rows, LENGTH, hidden_size] after the push, made in every row."""
    rows = [[replace(one)] for _ in states]
    plan = SteeringPlan(rows)
    plan.set_step(torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), 5, LENGTH, dtype=torch.bool))
    return plan(1, states)


def read(sae: SparseAutoencoder, states: Tensor, feature: int) -> Tensor:
    return sae.encode(states)[..., feature]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", SAES)
def test_a_clamp_is_read_back(name: str, asked: float) -> None:
    sae, states = SAES[name](), hidden(2)
    for feature in range(0, FEATURES, 7):
        after = pushed(of_feature("clamp", asked, feature, sae), states)
        found = read(sae, after, feature)
        pre = sae.pre(after)[..., feature]
        if asked == 0:
            assert found.abs().max() < 1e-5
        else:
            # What the activation does not let through is read as 0 at any size up to it.
            torch.testing.assert_close(pre, torch.full_like(pre, asked), atol=1e-4, rtol=0)
            assert ((found - asked).abs().min(found.abs()) < 1e-4).all()
        if asked >= 5 and name != "group_max":
            assert ((found - asked).abs() < 1e-4).all()


@pytest.mark.parametrize("asked", ASKED)
def test_a_clamp_is_read_back_by_a_pursuit(asked: float) -> None:
    sae, states = pursuit(), hidden(2)
    for feature in (0, 9, 30):
        start = read(sae, states, feature)
        found = read(sae, pushed(of_feature("clamp", asked, feature, sae), states), feature)
        # A pursuit says nothing of how far a feature that it does not take is from being taken.
        active = start > 0
        torch.testing.assert_close(found[active], torch.full_like(found[active], asked), atol=1e-3, rtol=0)


def test_a_top_k_that_does_not_select_the_feature_reads_zero_of_it() -> None:
    sae, states = sae_of(TopK(2)), hidden(2)
    after = pushed(of_feature("clamp", 0.05, 4, sae), states)
    torch.testing.assert_close(sae.pre(after)[..., 4], torch.full((2, LENGTH), 0.05), atol=1e-5, rtol=0)
    assert not read(sae, after, 4).any()


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("op", ["clamp", "multiply", "cap", "boost"])
def test_nothing_but_the_features_row_is_pushed(op: str, name: str) -> None:
    """The error of the SAE and all that is beside the row stay."""
    sae, states = SAES[name](), hidden(1)
    moved = pushed(of_feature(op, 0.7, 5, sae), states) - states
    along = (moved @ sae.direction(5))[..., None] * sae.direction(5)
    torch.testing.assert_close(moved, along, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SAES)
def test_a_clamp_to_nothing_or_less_leaves_a_feature_that_is_not_active(name: str) -> None:
    sae, states = SAES[name](), hidden(2)
    after = pushed(of_feature("clamp", 0.0, 5, sae), states)
    still = read(sae, states, 5) == 0
    assert still.any()
    assert torch.equal(after[still], states[still])


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("name", SAES)
def test_a_multiplied_latent_is_read_back(name: str, factor: float) -> None:
    sae, states = SAES[name](), hidden(4)
    for feature in (2, 5, 11):
        before, after = (
            read(sae, one, feature) for one in (states, pushed(of_feature("multiply", factor, feature, sae), states))
        )
        assert (before[before == 0] == after[before == 0]).all()
        wanted = factor * before
        # A smaller one may no longer be let through.
        lost = (after == 0) if factor < 1 else torch.zeros_like(after, dtype=torch.bool)
        torch.testing.assert_close(after[~lost], wanted[~lost], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAES)
def test_a_cap_bounds_what_is_read_and_leaves_what_is_below(name: str) -> None:
    sae, states, cap = SAES[name](), hidden(4), 0.5
    for feature in (2, 5, 11):
        before, after = read(sae, states, feature), pushed(of_feature("cap", cap, feature, sae), states)
        below = before <= cap
        assert (read(sae, after, feature) <= cap + 1e-4).all()
        assert torch.equal(after[below], states[below])


def test_a_gain_goes_that_part_of_the_way() -> None:
    sae, states = sae_of(Relu()), hidden(2)
    before = sae.pre(states)[..., 4]
    after = read(sae, pushed(of_feature("clamp", 9.0, 4, sae, gains=torch.tensor([0.25])), states), 4)
    torch.testing.assert_close(after, (before + 0.25 * (9.0 - before)).relu(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("op", ["clamp", "multiply", "cap", "boost"])
def test_an_sae_in_other_units_steers_alike(op: str) -> None:
    """Activations four times as large, decoder rows a quarter as long: the same SAE."""
    tensors, states = weights(), hidden(2)
    scaled = {
        **tensors,
        "W_enc": 4 * tensors["W_enc"],
        "b_enc": 4 * tensors["b_enc"],
        "W_dec": tensors["W_dec"] / 4,
    }
    strength = 0.7 if op in ("clamp", "cap") else 2.0
    larger = 4 * strength if op in ("clamp", "cap") else strength
    one = pushed(of_feature(op, strength, 5, sae_of(TopK(8), tensors)), states)
    other = pushed(of_feature(op, larger, 5, sae_of(TopK(8), scaled)), states)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_where_the_encoder_does_not_read_its_own_row_the_reconstruction_is_set() -> None:
    tensors, states = weights(), hidden(2)
    tensors["W_enc"][:, 5] = 0.5 * LEAST_OWN * tensors["W_dec"][5] / tensors["W_dec"][5].square().sum()
    sae = sae_of(Relu(), tensors)
    assert not sae.reads_back(5)
    wanted = states + (3.0 - sae.encode(states)[..., 5])[..., None] * sae.W_dec[5]
    torch.testing.assert_close(pushed(of_feature("clamp", 3.0, 5, sae), states), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "activation", [TopK(4), AbsTopK(4), GroupMax(8), JumpRelu(torch.tensor(0.3)), Relu()], ids=repr
)
def test_a_feature_is_reached_where_its_row_pushed_far_is_read(activation: Activation) -> None:
    """Also where encoder columns and decoder rows have little to do with each other."""
    generator, states = torch.Generator().manual_seed(6), hidden(1)
    tensors = weights()
    noise = torch.randn(tensors["W_enc"].shape, generator=generator)
    tensors["W_enc"] = tensors["W_enc"] / 2 + 0.1 * noise
    sae, found = sae_of(activation, tensors), set()
    for feature in range(FEATURES):
        if not sae.reads_back(feature):
            continue
        far = of_feature("add", 3e3 * sae.per_latent(feature), feature, sae)
        after = read(sae, pushed(far, states), feature)
        assert (after > 0).all() == (after > 0).any() == sae.reached(feature), feature
        found.add(sae.reached(feature))
    assert found == ({True} if isinstance(activation, JumpRelu | Relu) else {True, False})


def barely_read(own: float) -> SparseAutoencoder:
    """Under a TopK that takes another feature in the place of 5, whose row its encoder reads `own` of."""
    tensors = weights()
    row = tensors["W_dec"][5]
    tensors["W_enc"][:, 5] *= own / (tensors["W_enc"][:, 5] @ row)
    tensors["W_enc"][:, 6] = tensors["W_enc"][:, 5] * 20
    return sae_of(TopK(1), tensors)


@pytest.mark.parametrize("op", ["clamp", "multiply", "cap"])
def test_what_sets_a_latent_is_held_to_a_multiple_of_the_state(op: str) -> None:
    """Whatever the operator asks for, and only there, in either direction."""
    sae = barely_read(LEAST_OWN * 1.01) if op == "clamp" else sae_of(Relu())
    assert sae.reads_back(5)
    assert op != "clamp" or not sae.reached(5)
    states = hidden(2)
    for strength in (-4e3, 20.0, 4e3):
        one = of_feature(op, strength, 5, sae)
        plan = SteeringPlan([[one]])
        plan.set_step(torch.zeros(1, dtype=torch.float64), torch.ones(1, 5, LENGTH, dtype=torch.bool))
        after = plan(1, states[:1])
        plan.count()
        plan.flush()
        ratios = (after - states[:1]).norm(dim=2) / states[:1].norm(dim=2)
        assert ratios.max() <= LARGEST_LATENT * (1 + 1e-5)
        held = int((ratios > LARGEST_LATENT * (1 - 1e-5)).sum())
        assert one.applied.clipped == held
        assert one.applied.ratio_max == pytest.approx(float(ratios.max()), rel=1e-4)
        if op == "clamp":
            assert held == (LENGTH if abs(strength) > 100 else held)
    # What adds is as large as is asked.
    added = (pushed(of_feature("add", 4e3, 5, sae), states) - states).norm(dim=2)
    torch.testing.assert_close(added, torch.full_like(added, 4e3), rtol=1e-4, atol=0)


def test_a_push_that_is_held_is_held_alike_beside_others() -> None:
    sae, states = barely_read(LEAST_OWN * 1.01), hidden(2)
    rows = [[of_feature("clamp", 4e3, 5, sae), push("add", 0.5)], [push("add", 0.5)]]
    plan, alone = SteeringPlan(rows), SteeringPlan([[replace(one, applied=Applied()) for one in rows[0]]])
    for one, count in ((plan, 2), (alone, 1)):
        one.set_step(torch.zeros(count, dtype=torch.float64), torch.ones(count, 5, LENGTH, dtype=torch.bool))
    assert torch.equal(plan(1, states)[0], alone(1, states[:1])[0])
    plan.count()
    plan.flush()
    assert [one.applied.clipped for one in rows[0]] == [LENGTH, 0]


def test_a_direction_without_a_latent_is_clamped_by_its_projection() -> None:
    states = hidden(2)
    one = replace(of_feature("clamp", 3.0, 5, sae_of(Relu())), sae=None, feature=None)
    torch.testing.assert_close(pushed(one, states) @ one.direction, torch.full((2, LENGTH), 3.0))


def test_a_reading_of_a_feature_is_of_the_states_after_the_push() -> None:
    sae, states = sae_of(TopK(8)), hidden(2)
    watch = of_feature("read", 0.0, 4, sae, scope="response")
    plan = SteeringPlan([[of_feature("clamp", 6.0, 4, sae), watch], [of_feature("read", 0.0, 4, sae)]])
    plan.set_step(torch.zeros(2, dtype=torch.float64), torch.ones(2, 5, LENGTH, dtype=torch.bool))
    after = plan(1, states)
    assert torch.equal(after[1], states[1])
    assert torch.equal(plan.projections(watch), read(sae, after[0], 4))
    assert plan.readings()[id(watch)] == pytest.approx(6.0, abs=1e-4)
