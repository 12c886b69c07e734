"""What a row may ask of its refinement, and how it is scored."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.params import Refine
from steerserve.engine.api.scoring import likelihood, log_probability
from steerserve.engine.request.refinement import Draft, Refinement
from steerserve.errors import RequestError
from tests import tiny
from tests.engine.feedback.test_refining import PLAIN, probed
from tests.engine.outputs.test_verdicts import ARCHAIC


@pytest.mark.parametrize("odds", [-700.0, -3.0, 0.0, 1e-9, 5.0, 40.0, 1e4])
def test_a_log_probability_is_that_of_its_odds(odds: float) -> None:
    assert log_probability(odds) == pytest.approx(-math.log1p(math.exp(-odds)) if odds > -500 else odds)
    assert log_probability(odds) <= 0


def test_attributes_are_independent_and_those_named_absent_are_wanted_not_to_be_there() -> None:
    odds = {"a": 1.0, "b": -2.0}
    both = math.log(1 / (1 + math.exp(-1))) + math.log(1 / (1 + math.exp(2)))
    assert likelihood(odds) == pytest.approx(both)
    without = math.log(1 / (1 + math.exp(-1))) + math.log(1 / (1 + math.exp(-2)))
    assert likelihood(odds, frozenset({"b"})) == pytest.approx(without)


def test_a_draft_that_is_only_as_good_is_not_kept() -> None:
    state = Refinement(3, 2, 2, frozenset(), stretch=(0, 2))
    assert (state.going, state.outcome, state.rounds_left) == (True, None, 3)
    for score in (-2.0, -2.0, -1.0, -1.5):
        state.weigh(Draft((1, 2), {}, {}, {"a": score}, score))
    assert (state.going, state.outcome, state.rounds_left) == (False, {"a": -1.0}, 0)
    told = state.receipt()["refined"]
    assert [one["kept"] for one in told["rounds"]] == [False, True, False]
    assert (told["first_score"], told["score"], told["kept"]) == (-2.0, -1.0, 1)


def test_scores_close_to_none_at_all_can_still_be_told_apart() -> None:
    state = Refinement(1, 2, 2, frozenset(), stretch=(0, 2))
    for score in (-2.2e-9, -2.1e-9):
        state.weigh(Draft((1, 2), {}, {}, {"a": 20.0}, score))
    told = state.receipt()["refined"]
    assert told["rounds"][0]["kept"] and told["score"] > told["first_score"]


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"refine": Refine(rounds=0)}, "refine.rounds", "from 1 to 256, got 0"),
        ({"refine": Refine(rounds=257)}, "refine.rounds", "from 1 to 256, got 257"),
        ({"refine": Refine(rounds=True)}, "refine.rounds", "whole number.*got True"),
        ({"refine": Refine(span=0)}, "refine.span", r"from 1 to max_tokens \(12\), got 0"),
        ({"refine": Refine(span=13)}, "refine.span", r"from 1 to max_tokens \(12\), got 13"),
        ({"verdicts": ()}, "refine", "name attributes to judge by"),
        ({"refine": Refine(absent=("topic/sports",))}, "refine.absent", "'topic/sports' is not among"),
        ({"early_exit": True}, "early_exit", "cannot go with what takes tokens back"),
        ({"steps": 12, "refine": Refine(256, 12)}, "refine.rounds", "256 rounds of up to 12 steps.*are 3084 steps"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_field(
    tmp_path: Path, changes: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(RequestError, match=said) as error:
        probed("bert", tmp_path).admit(replace(PLAIN, **changes))
    assert error.value.param == param


def test_a_cache_is_of_one_writing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot go with a cache") as error:
        probed("llada", tmp_path).admit(replace(PLAIN, prompt=(9, 10), cache="dual", block_length=4))
    assert error.value.param == "refine"


def test_attributes_to_judge_by_must_have_a_probe(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no probe"):
        tiny.engine(tiny.bert(), tmp_path).admit(PLAIN)


def test_the_plan_says_how_long_it_may_take(tmp_path: Path) -> None:
    served = probed("bert", tmp_path)
    plan = served.admit(replace(PLAIN, refine=Refine(), verdicts=(ARCHAIC,))).plan
    assert plan["refine"] == {"rounds": 16, "span": 4, "round_steps": 2}
    assert plan["max_steps"] == 6 + 16 * 2
    assert served.admit(replace(PLAIN, refine=None)).plan["refine"] is None
    request = served.admit(PLAIN)
    assert request.steps_left == 6 + 6 * 2
