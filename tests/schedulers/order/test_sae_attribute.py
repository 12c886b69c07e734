"""The order by an attribute's uptake, against a plain reading of its rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schedulers import Candidates, build_order, uptake
from schedulers.order import SaeAttribute, select

UNIT = st.floats(0, 1)


@given(pairs=st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=12), weight=UNIT)
def test_the_score_is_the_weighted_mean_of_probability_and_uptake(
    pairs: list[tuple[float, float]], weight: float
) -> None:
    probability, taken = torch.tensor(pairs).unbind(1)
    scores = SaeAttribute(weight).score(Candidates(probability, uptake=taken))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([p + weight * (u - p) for p, u in pairs], abs=1e-6)


def test_a_sure_position_waits_for_one_that_has_taken_the_attribute_up() -> None:
    candidates = Candidates(torch.tensor([0.9, 0.8]), uptake=torch.tensor([0.0, 1.0]))
    first = torch.tensor([1])
    assert select(SaeAttribute().score(candidates), torch.tensor([0, 0]), first).tolist() == [False, True]
    assert select(SaeAttribute(0.0).score(candidates), torch.tensor([0, 0]), first).tolist() == [True, False]


def plain_uptake(value: float, low: float, high: float) -> float:
    if high <= low or value <= low:
        return 0.0
    return 1.0 if value >= high else (value - low) / (high - low)


LEVELS = st.integers(-20, 20).map(lambda i: i / 4)


@given(rows=st.lists(st.tuples(st.floats(-9, 9, width=32), LEVELS, LEVELS), min_size=1, max_size=12))
def test_uptake_is_linear_between_the_levels_of_each_row(rows: list[tuple[float, float, float]]) -> None:
    values, low, high = torch.tensor(rows).unbind(1)
    taken = uptake(values, low, high)
    assert taken.dtype == torch.float32
    assert taken.tolist() == pytest.approx([plain_uptake(*row) for row in rows], abs=1e-6)
    value, bottom, top = rows[0]
    if bottom < top:
        assert uptake(values, bottom, top)[0].item() == pytest.approx(plain_uptake(value, bottom, top), abs=1e-6)


def test_uptake_of_half_precision_is_worked_out_in_full() -> None:
    values = torch.tensor([1.0, 2.5, 4.0], dtype=torch.bfloat16)
    assert uptake(values, 1.0, 4.0).tolist() == [0.0, 0.5, 1.0]
    assert uptake(torch.zeros(0), 0.0, 1.0).shape == (0,)


def test_levels_that_are_none_are_refused() -> None:
    for low, high in [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match="high must be above low"):
            uptake(torch.zeros(2), low, high)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"type": "sae_attribute", "weight": 2}, "weight must be a finite number from 0 to 1, not 2"),
        ({"type": "sae_attribute", "attribute": 4}, "attribute must be the name of an attribute, not 4"),
        ({"type": "sae_attribute", "attribute": ""}, "attribute must be the name of an attribute, not ''"),
        ({"type": "sae_attribute", "sae": "a"}, "has no option 'sae'; allowed: weight, attribute"),
    ],
)
def test_bad_options_are_refused(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_order(choice)


def test_it_is_chosen_by_name_and_says_what_it_reads() -> None:
    assert build_order("sae_attribute") == SaeAttribute()
    assert build_order({"type": "sae_attribute", "weight": 0.5, "attribute": "sports"}) == SaeAttribute(0.5, "sports")
    assert SaeAttribute().needs == {"probability", "uptake"}
    with pytest.raises(ValueError, match="needs the candidates' uptake"):
        SaeAttribute().score(Candidates(torch.zeros(1)))
