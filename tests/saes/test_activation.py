"""Every activation against its rule, written out feature by feature, and the order it gives features."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerserve.saes.activation import AbsTopK, Activation, GroupMax, JumpRelu, Relu, TopK

FEATURES = 12
THRESHOLD = torch.linspace(-0.5, 1.0, FEATURES)


def top_k(pre: list[float], k: int) -> list[float]:
    kept = sorted(range(FEATURES), key=lambda f: -pre[f])[:k]
    return [max(0.0, pre[f]) if f in kept else 0.0 for f in range(FEATURES)]


def abs_top_k(pre: list[float], k: int) -> list[float]:
    kept = sorted(range(FEATURES), key=lambda f: -abs(pre[f]))[:k]
    return [pre[f] if f in kept else 0.0 for f in range(FEATURES)]


def group_max(pre: list[float], k: int) -> list[float]:
    width, out = FEATURES // k, [0.0] * FEATURES
    for start in range(0, FEATURES, width):
        best = max(range(start, start + width), key=lambda f: pre[f])
        out[best] = max(0.0, pre[best])
    return out


def jump_relu(pre: list[float], _: int) -> list[float]:
    return [value if value > 0 and value > float(THRESHOLD[f]) else 0.0 for f, value in enumerate(pre)]


CASES: dict[str, tuple[Activation, Callable[[list[float], int], list[float]]]] = {
    "relu": (Relu(), lambda pre, _: [max(0.0, value) for value in pre]),
    "topk": (TopK(3), top_k),
    "abstopk": (AbsTopK(3), abs_top_k),
    "groupmax": (GroupMax(3), group_max),
    "jumprelu": (JumpRelu(THRESHOLD), jump_relu),
}


def draw(seed: int) -> Tensor:
    return torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_activations_follow_their_rule(name: str, seed: int) -> None:
    activation, rule = CASES[name]
    pre = draw(seed)
    wanted = torch.tensor([[rule(token.tolist(), 3) for token in row] for row in pre])
    assert torch.equal(activation(pre), wanted)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_rank_puts_active_features_first_by_their_size(name: str, seed: int) -> None:
    activation: Activation = CASES[name][0]
    pre = draw(seed).flatten(0, 1)
    for scores, row in zip(activation.rank(pre), activation(pre).abs(), strict=True):
        order = scores.argsort(descending=True)
        count = int((row > 0).sum())
        assert set(order[:count].tolist()) == set(row.nonzero()[:, 0].tolist())
        assert torch.equal(row[order], row.sort(descending=True).values)


def test_one_threshold_may_stand_for_all() -> None:
    pre = draw(1)
    assert torch.equal(JumpRelu(torch.tensor(0.4))(pre), JumpRelu(torch.full((FEATURES,), 0.4))(pre))


def test_a_threshold_below_zero_lets_nothing_negative_through() -> None:
    pre = draw(2)
    assert torch.equal(JumpRelu(torch.tensor(-1.0))(pre), torch.relu(pre))
