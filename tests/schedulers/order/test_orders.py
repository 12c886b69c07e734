"""Every order's score against a plain reading of its rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from schedulers import ORDERS, Candidates, Order, build_order, feature_stability
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
