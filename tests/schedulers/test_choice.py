"""Choices as a caller sends them: what is built, and the messages for what is not."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedulers import ORDERS, STRENGTHS, TRANSFERS, build_order, build_strength, build_transfer
from schedulers.order import Confidence, SaeStability
from schedulers.strength import Commitment, Piecewise, Window
from schedulers.transfer import EntropyBound, Linear, Threshold

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OPTIONS = st.sampled_from(["start", "stop", "points", "preset", "blocks", "gate", "norm", "weight", "sae", "value"])
NAMES = st.sampled_from([*STRENGTHS, *ORDERS, *TRANSFERS]) | JSON


def test_choices_build_frozen_hashable_configs() -> None:
    assert build_order("confidence") == Confidence()
    assert build_order({"type": "sae_stability", "weight": 1, "sae": "layer-4"}) == SaeStability(1.0, "layer-4")
    assert build_transfer({"type": "linear"}) == Linear()
    assert build_transfer("threshold") == Threshold(0.9)
    assert build_transfer({"type": "entropy_bound", "value": 0}) == EntropyBound(0.0)
    assert build_strength({"type": "window", "start": 0, "stop": 1})[0] == Window(0.0, 1.0)
    assert build_strength({"type": "commitment", "blocks": 16})[0] == Commitment(blocks=16)
    drawn = build_strength({"type": "piecewise", "points": [[0, 1], [0.5, 2.5]]})[0]
    assert drawn == Piecewise(((0.0, 1.0), (0.5, 2.5)))
    assert hash(drawn) == hash(Piecewise(((0.0, 1.0), (0.5, 2.5))))
    assert build_strength({"type": "piecewise", "points": [], "preset": "ramp_up"})[0] == Piecewise(preset="ramp_up")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("best", "unknown order 'best'; known: confidence, entropy, margin, random, sae_attribute, sae_stability"),
        ({"type": "random", "seed": 3}, "order 'random' has no option 'seed'; allowed: none"),
        (
            {"type": "sae_stability", "k": 3},
            "order 'sae_stability' has no option 'k'; allowed: weight, sae",
        ),
        ({"weight": 0.5}, "order must have a type, the name of one, not None"),
        ({"type": ["random"]}, "order must have a type, the name of one, not ['random']"),
        (7, 'order must be a name or {"type": name, ...}, not 7'),
        (
            {"type": "sae_stability", "weight": 2},
            "order 'sae_stability': weight must be a finite number from 0 to 1, not 2",
        ),
        ({"type": "sae_stability", "sae": 4}, "order 'sae_stability': sae must be the name of an SAE, not 4"),
    ],
)
def test_messages_of_refused_orders(choice: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_order(choice)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "fast",
            "unknown transfer 'fast'; known: analytic, cosine, ddpm, ddpm_cache, entropy_bound, euler, "
            "joint_threshold, linear, origin, remdm, threshold, timesteps",
        ),
        (
            {"type": "threshold", "value": 0},
            "transfer 'threshold': value must be above 0: 0 would commit everything at the first step",
        ),
        (
            {"type": "threshold", "value": 1.5},
            "transfer 'threshold': value must be a finite number from 0 to 1, not 1.5",
        ),
        (
            {"type": "entropy_bound", "value": -1},
            "transfer 'entropy_bound': value must be a finite number from 0 to 1e+06, not -1",
        ),
    ],
)
def test_messages_of_refused_transfers(choice: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_transfer(choice)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("best", "unknown schedule 'best'; known: commitment, feedback, optimal, piecewise, uniform, window"),
        ("window", "schedule 'window' needs start and stop"),
        ({"type": "window", "start": 0.5}, "schedule 'window' needs stop"),
        (
            {"type": "window", "begin": 0, "stop": 1},
            "schedule 'window' has no option 'begin'; allowed: start, stop, norm",
        ),
        (
            {"type": "window", "start": 0.5, "stop": 0.5},
            "schedule 'window': stop must be greater than start, not 0.5 with start 0.5",
        ),
        (
            {"type": "window", "start": -0.1, "stop": 0.5},
            "schedule 'window': start must be a finite number from 0 to 1, not -0.1",
        ),
        ({"type": "uniform", "norm": "max"}, "schedule 'uniform': norm must be one of kl, l2, mean, peak, not 'max'"),
        (
            {"type": "commitment", "blocks": 8.0},
            "schedule 'commitment': blocks must be an integer from 1 to 1024, not 8.0",
        ),
        (
            {"type": "commitment", "gate": "0"},
            "schedule 'commitment': gate must be a finite number from 0 to 1, not '0'",
        ),
        (
            {"type": "piecewise", "preset": "bump"},
            "schedule 'piecewise': preset must be one of cosine_down, cosine_up, ramp_down, ramp_up, not 'bump'",
        ),
        (
            {"type": "piecewise", "preset": "ramp_up", "points": [[0, 1], [1, 1]]},
            "schedule 'piecewise': give either points or a preset, not both",
        ),
        (
            {"type": "piecewise", "points": [[0.5, 1], [0.5, 2]]},
            "schedule 'piecewise': points must go up in progress: points[1] is at 0.5 after 0.5",
        ),
        (
            {"type": "piecewise", "points": [[0, 0], [1, 0]]},
            "schedule 'piecewise': points must have a gain above 0 somewhere, 1e-06 at least",
        ),
        (
            {"type": "piecewise", "points": [[0, 1], [1]]},
            "schedule 'piecewise': points[1] must be a pair [progress, gain], not [1]",
        ),
        (
            {"type": "piecewise", "points": [[0, 1], [1, -2]]},
            "schedule 'piecewise': points[1][1], a gain, must be a finite number from 0 to 1e+06, not -2",
        ),
        (
            "piecewise",
            "schedule 'piecewise': points must be a list of 2 to 256 pairs [progress, gain], not 0 of them; "
            "or give a preset: cosine_down, cosine_up, ramp_down, ramp_up",
        ),
    ],
)
def test_messages_of_refused_schedules(choice: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_strength(choice)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], 10**400])
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match="value must be a finite number"):
        build_transfer({"type": "threshold", "value": value})
    with pytest.raises(ValueError, match="stop must be a finite number"):
        build_strength({"type": "window", "start": 0.0, "stop": value})
    with pytest.raises(ValueError, match="weight must be a finite number"):
        build_order({"type": "sae_stability", "weight": value})


@given(name=NAMES, options=st.dictionaries(OPTIONS | st.text(max_size=3), JSON, max_size=3))
def test_whatever_is_sent_is_built_or_refused_in_a_few_words(name: Any, options: dict[str, Any]) -> None:
    for build in (build_strength, build_order, build_transfer):
        for choice in (name, {"type": name, **options}):
            try:
                hash(build(choice))
            except ValueError as error:
                assert 0 < len(str(error)) < 1000
