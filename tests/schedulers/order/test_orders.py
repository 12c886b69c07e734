"""Every order's score against a plain reading of its rule."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from schedulers import ORDERS, Candidates, Order, build_order, feature_stability, select
from schedulers.order import SaeStability

DISTRIBUTIONS = st.lists(st.lists(st.integers(1, 50), min_size=6, max_size=6), min_size=1, max_size=12)


def candidates_of(probabilities: Tensor, uniform: Tensor, stability: Tensor) -> Candidates:
    top = probabilities.topk(2, dim=1).values
    return Candidates(
        probability=top[:, 0],
        margin=top[:, 0] - top[:, 1],
        entropy=torch.special.entr(probabilities).sum(1),
        uniform=uniform,
        stability=stability,
        uptake=stability,
    )


def plain_score(order: str, probabilities: list[float], uniform: float, stability: float) -> float:
    best, second = sorted(probabilities, reverse=True)[:2]
    if order == "random":
        return uniform
    if order == "confidence":
        return best
    if order == "margin":
        return best - second
    if order == "entropy":
        return float(sum(p * torch.tensor(p).log().item() for p in probabilities))
    return 0.7 * best + 0.3 * stability


@pytest.mark.parametrize("name", sorted(ORDERS))
@given(weights=DISTRIBUTIONS, seed=st.integers(0, 1000))
def test_scores_follow_the_rule(name: str, weights: list[list[int]], seed: int) -> None:
    probabilities = torch.tensor(weights).float()
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    uniform, stability = torch.rand(2, len(weights), generator=torch.Generator().manual_seed(seed))
    scores = build_order(name).score(candidates_of(probabilities, uniform, stability))
    expected = [
        plain_score(name, p, u, s)
        for p, u, s in zip(probabilities.tolist(), uniform.tolist(), stability.tolist(), strict=True)
    ]
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_an_order_reads_just_what_it_says_it_needs(name: str) -> None:
    order: Order = build_order(name)
    values = torch.tensor([0.1, 0.5])
    everything = dict.fromkeys(order.needs, values)
    assert order.score(Candidates(**everything)).shape == (2,)
    for field in order.needs:
        with pytest.raises(ValueError, match=f"needs the candidates' {field}"):
            order.score(Candidates(**everything | {field: None}))


SURE = {"confidence": "probability", "margin": "margin", "entropy": "entropy"}


@pytest.mark.parametrize("name", sorted(SURE))
def test_filtered_measures_are_those_of_the_distribution_drawn_from(name: str) -> None:
    own, cut = torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.5, 0.9, 0.7])
    everything = Candidates(**{SURE[name]: own, f"filtered_{SURE[name]}": cut})
    sign = -1 if name == "entropy" else 1
    plain, filtered = build_order(name), build_order({"type": name, "filtered": True})
    assert plain.needs == {SURE[name]}
    assert filtered.needs == {f"filtered_{SURE[name]}"}
    assert plain.score(everything).tolist() == (sign * own).tolist()
    assert filtered.score(everything).tolist() == (sign * cut).tolist()


def drawn_in_order(weights: list[float], order: tuple[int, ...]) -> float:
    """Chance of drawing these positions in this order without replacement, by their weights."""
    left, chance = sum(weights), 1.0
    for i in order:
        chance *= weights[i] / left
        left -= weights[i]
    return chance


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("name", sorted(SURE))
@pytest.mark.parametrize("count", [1, 2])
def test_a_temperature_draws_positions_without_replacement(name: str, filtered: bool, count: int) -> None:
    draws, alg_temp = 6000, 0.4
    field = f"filtered_{SURE[name]}" if filtered else SURE[name]
    values = [0.9, 0.5, 0.3, 0.05]
    order = build_order({"type": name, "filtered": filtered, "alg_temp": alg_temp})
    assert order.needs == {field, "uniform"}
    uniform = torch.rand(4 * draws, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    row = torch.arange(draws).repeat_interleave(4)
    candidates = Candidates(uniform=uniform, **{field: torch.tensor(values * draws)})
    chosen = select(order.score(candidates), row, torch.full((draws,), count)).reshape(draws, 4)
    counts = Counter(tuple(kept.nonzero()[:, 0].tolist()) for kept in chosen)
    sign = -1 if name == "entropy" else 1
    weights = [math.exp(sign * value / alg_temp) for value in values]
    chi, sets = 0.0, list(itertools.combinations(range(4), count))
    for kept in sets:
        expected = draws * sum(drawn_in_order(weights, order) for order in itertools.permutations(kept))
        chi += (counts[kept] - expected) ** 2 / expected
    freedom = len(sets) - 1
    assert sum(counts.values()) == draws
    assert chi <= freedom + 4 * math.sqrt(2 * freedom)


def test_a_draw_of_0_still_tells_candidates_apart() -> None:
    order = build_order({"type": "confidence", "alg_temp": 0.5})
    zero = torch.zeros(3, dtype=torch.float64)
    scores = order.score(Candidates(probability=torch.tensor([0.1, 0.9, 0.5]), uniform=zero))
    assert torch.isfinite(scores).all()
    assert scores.argsort().tolist() == [0, 2, 1]


@pytest.mark.parametrize("name", sorted(SURE))
@pytest.mark.parametrize(
    "options", [{"alg_temp": -0.1}, {"alg_temp": float("inf")}, {"alg_temp": True}, {"filtered": "yes"}, {"eps": 1.0}]
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        build_order({"type": name, **options})


def test_sae_stability_without_weight_is_confidence() -> None:
    values, stability = torch.tensor([0.1, 0.5]), torch.tensor([1.0, 0.0])
    assert SaeStability(weight=0.0).score(Candidates(values, stability=stability)).tolist() == values.tolist()
    assert SaeStability(weight=1.0).score(Candidates(values, stability=stability)).tolist() == [1.0, 0.0]


def plain_stability(previous: list[int], now: list[int], seen: bool) -> float:
    if not seen:
        return 0.0
    before, after = {i for i in previous if i >= 0}, {i for i in now if i >= 0}
    union = before | after
    jaccard = len(before & after) / len(union) if union else 0.0
    held = 1.0 if now[0] >= 0 and previous[0] == now[0] else 0.0
    return 0.5 * jaccard + 0.5 * held


@st.composite
def feature_steps(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    k = draw(st.integers(1, 6))
    row = st.permutations(range(8)).flatmap(
        lambda ids: st.integers(0, k).map(lambda held: [i if at < held else -1 for at, i in enumerate(ids[:k])])
    )
    pairs = draw(st.lists(st.tuples(row, row, st.booleans()), min_size=1, max_size=10))
    return [p for p, _, _ in pairs], [n for _, n, _ in pairs], [s for _, _, s in pairs]


@given(steps=feature_steps())
def test_feature_stability_is_half_jaccard_and_half_the_top_feature_held(
    steps: tuple[list[list[int]], list[list[int]], list[bool]],
) -> None:
    previous, now, seen = steps
    got = feature_stability(torch.tensor(previous), torch.tensor(now), torch.tensor(seen))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([plain_stability(*step) for step in zip(*steps, strict=True)])


def test_feature_stability_of_unchanged_features_is_one() -> None:
    ids = torch.tensor([[5, 2, 9], [1, 0, 7]])
    assert feature_stability(ids, ids, torch.tensor([True, True])).tolist() == [1.0, 1.0]
    assert feature_stability(ids, ids + 100, torch.tensor([True, True])).tolist() == [0.0, 0.0]


def test_feature_stability_of_no_positions_is_empty() -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert feature_stability(none, none, torch.zeros(0, dtype=torch.bool)).shape == (0,)
