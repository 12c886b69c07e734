"""The joint profile: its grids, its parts, its JSON, and what it refuses."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schedulers import JointProfile

GOOD: dict[str, Any] = {
    "names": ["topic", "tone"],
    "sensitivity": [[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]],
    "cost": [[[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [[3.0, -1.0], [-1.0, 2.0]]],
}


@given(seed=st.integers(0, 1000), attributes=st.integers(1, 4), slices=st.integers(1, 6))
def test_it_survives_json_unchanged(seed: int, attributes: int, slices: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(slices, attributes, attributes + 1, generator=draw, dtype=torch.float64)
    cost = factors @ factors.mT + 0.1 * torch.eye(attributes)
    profile = JointProfile(
        tuple("abcd"[:attributes]),
        tuple(map(tuple, torch.randn(attributes, slices, generator=draw).tolist())),
        tuple(tuple(map(tuple, matrix)) for matrix in ((cost + cost.mT) / 2).tolist()),
    )
    again = JointProfile.from_json(json.loads(json.dumps(profile.to_json())))
    assert again == profile
    assert hash(again) == hash(profile)
    assert again.slices == slices


def test_on_another_grid_values_are_means_over_each_slice() -> None:
    profile = JointProfile.from_json(GOOD)
    assert profile.sensitivity_on(3).tolist() == GOOD["sensitivity"]
    assert profile.cost_on(3).tolist() == GOOD["cost"]
    assert profile.sensitivity_on(1).tolist() == [[pytest.approx(2.0)], [pytest.approx(-1 / 6)]]
    assert profile.cost_on(1)[0].flatten().tolist() == pytest.approx([2.0, -1 / 6, -1 / 6, 4 / 3])
    assert profile.sensitivity_on(6)[0].tolist() == pytest.approx([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    assert profile.cost_on(6)[5].tolist() == GOOD["cost"][2]


def test_some_of_the_attributes_in_another_order() -> None:
    profile = JointProfile.from_json(GOOD)
    turned = profile.of(["tone", "topic"])
    assert turned.names == ("tone", "topic")
    assert turned.sensitivity == profile.sensitivity[::-1]
    assert turned.cost[2] == ((2.0, -1.0), (-1.0, 3.0))
    assert profile.of(["tone"]).cost == (((1.0,),), ((1.0,),), ((2.0,),))
    with pytest.raises(ValueError, match="the joint profile lacks 'mood'; it has topic, tone"):
        profile.of(["mood", "topic"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["topic", "topic"]}, "names must be a list of different names"),
        ({"names": []}, "names must be a list of different names, 1 or more"),
        ({"names": "topic"}, "names must be a list"),
        ({"names": ["topic", 3]}, "names must be"),
        ({"names": ["topic", "tone", "mood"]}, "sensitivity must have a row for each of the 3 names, not 2"),
        ({"sensitivity": [[1.0], [1.0, 2.0]]}, r"sensitivity must have rows of one length, not \[1, 2\]"),
        ({"sensitivity": [[], []]}, "sensitivity must have rows of one length"),
        ({"sensitivity": [[1.0, 1.0, float("nan")], [1.0] * 3]}, r"sensitivity\[0\]\[2\] must be a finite number"),
        ({"cost": [[[1.0]]]}, "cost must have a matrix for each of the 3 slices, not 1"),
        ({"cost": [[[1.0, 0.0]]] * 3}, r"cost\[0\] must be 2 by 2"),
        ({"cost": [[[1.0, 0.2], [0.1, 1.0]]] * 3}, r"cost\[0\] must be symmetric"),
        ({"cost": [[[1.0, 2.0], [2.0, 1.0]]] * 3}, r"cost\[0\] must be positive definite"),
        ({"cost": [[[1.0, 1.0], [1.0, 1.0]]] * 3}, r"cost\[0\] must be positive definite"),
        ({"cost": [[[1.0, 0.0], [0.0, 0.0]]] * 3}, r"cost\[0\]\[1\]\[1\] must be positive, not 0"),
        ({"cost": 3}, "cost must be a list, not 3"),
        ({"more": 1}, "joint profile has unknown keys 'more'; allowed: names, sensitivity, cost"),
    ],
)
def test_from_json_refuses_what_is_no_profile(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointProfile.from_json(GOOD | change)


def test_from_json_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="joint profile lacks sensitivity and cost"):
        JointProfile.from_json({"names": ["a"]})
    with pytest.raises(ValueError, match="a joint profile must be an object"):
        JointProfile.from_json([1])  # type: ignore[arg-type]


def test_attributes_in_units_far_apart_are_judged_alike() -> None:
    tiny = [[[1e-8, 0.0], [0.0, 1e8]]] * 3
    assert JointProfile.from_json(GOOD | {"cost": tiny}).slices == 3
