import json
import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.api.events import WORDLESS, Result
from steerserve.engine.api.params import Intervention
from steerserve.errors import RequestError
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.parsing import parse
from steerserve.server.rows.criteria import explained, ranking_of, unwanted
from steerserve.server.rows.ranking import Criterion, Ranking, probability, ranked, score

A, B = "topic/a", "tone/b"


def result(
    text: str = "a",
    finish_reason: Literal["stop", "length", "content_filter"] = "length",
    logprobs: tuple[float, ...] | None = None,
    **verdicts: float,
) -> Result:
    told = {name: verdicts[key] for name, key in ((A, "a"), (B, "b")) if key in verdicts}
    return Result((1,), text, finish_reason, 1, 1, 1, None, logprobs=logprobs, verdicts=told or None)


def asked(steering: dict[str, Any], **fields: Any) -> Ranking:
    body = {"model": "text", "best_of": 4, "steering": steering} | fields
    return ranking_of(parse(json.dumps(body).encode(), CompletionRequest))


def pushes(*interventions: dict[str, Any]) -> dict[str, Any]:
    return {"interventions": [{"attribute": A} | one for one in interventions]}


ODDS = st.floats(-20, 20)


@given(st.lists(st.tuples(ODDS, ODDS, st.sampled_from(["x", "", " \n"]), st.booleans()), max_size=8), st.booleans())
def test_candidates_are_in_the_order_of_the_probability_that_they_are_as_wished(
    told: list[tuple[float, float, str, bool]], absent: bool
) -> None:
    results = [result(text, "content_filter" if filtered else "length", a=a, b=b) for a, b, text, filtered in told]
    found = ranked(results, [Criterion(A), Criterion(B, absent)])

    best: list[int] = []
    for fails in (False, True):
        left = [i for i, (_, _, text, filtered) in enumerate(told) if (not text.strip() or filtered) == fails]
        while left:
            worth = [
                -math.log1p(math.exp(-told[i][0])) - math.log1p(math.exp(told[i][1] * (1 if absent else -1)))
                for i in left
            ]
            # Those whose worth differs by rounding alone may be told apart either way.
            first = next(i for i, w in zip(left, worth, strict=True) if w >= max(worth) - 1e-12 * abs(max(worth)))
            best.append(first)
            left.remove(first)
    worths = [score(results[i], [Criterion(A), Criterion(B, absent)]) for i in found]
    assert worths == pytest.approx([score(results[i], [Criterion(A), Criterion(B, absent)]) for i in best], rel=1e-9)
    assert sorted(found) == list(range(len(told)))


def test_of_equals_the_earlier_is_better() -> None:
    results = [result(a=1.0), result(a=2.0), result(a=1.0), result(a=2.0)]
    assert ranked(results, [Criterion(A)]) == [1, 3, 0, 2]
    assert ranked(results, [Criterion(A, absent=True)]) == [0, 2, 1, 3]


def test_a_text_that_shows_nothing_is_not_the_surest_to_lack_what_is_not_wanted() -> None:
    results = [result("\u200b", a=WORDLESS), result(a=5.0), result(a=-5.0)]
    assert ranked(results, [Criterion(A, absent=True)]) == [2, 1, 0]


def test_without_wishes_the_mean_log_probability_ranks() -> None:
    logprobs = [(-1.0, -3.0), (-1.5,), (-0.1, -0.1, -9.0), (), (-math.inf,)]
    results = [result(logprobs=one) for one in logprobs]
    assert [score(one, ()) for one in results] == [-2.0, -1.5, pytest.approx(-3.0666667), None, -9999.0]
    assert ranked(results, ()) == [1, 0, 2, 4, 3]


@given(st.floats(-1e4, 1e4))
def test_probabilities_and_scores_are_numbers_that_json_can_say(log_odds: float) -> None:
    found = score(result(a=log_odds), [Criterion(A)])
    assert found is not None and math.isfinite(found) and found <= 0
    assert probability(log_odds) == pytest.approx(math.exp(found))
    assert probability(log_odds) + probability(-log_odds) == pytest.approx(1)


@pytest.mark.parametrize(
    ("steering", "rank"),
    [
        ({}, []),
        (pushes({}), [A]),
        (pushes({"strength": -0.5}), [f"-{A}"]),
        (pushes({}, {"layers": [1]}, {"attribute": B, "strength": -1}), [A, f"-{B}"]),
        (pushes({}) | {"rank": [f"-{B}"]}, [f"-{B}"]),
        (pushes({}) | {"rank": []}, []),
        (pushes({}, {"strength": -1}) | {"rank": [A]}, [A]),
        ({"interventions": [{"vector": {"name": "v"}, "strength": 1}]}, []),
    ],
)
def test_what_is_pushed_is_what_ranks_unless_the_request_says_otherwise(
    steering: dict[str, Any], rank: list[str]
) -> None:
    assert asked(steering).rank == rank
    assert asked(steering).by_logprobs == (not rank)
    plain = asked(steering, best_of=1)
    assert plain.rank == (rank if "rank" in steering else None)
    assert not plain.chooses and not plain.by_logprobs


@pytest.mark.parametrize(
    ("op", "strengths"),
    [
        ("add", {None: False, -1: True, 0: False, 1: False}),
        ("boost", {-1: True, 1: False}),
        ("multiply", {0: True, 0.5: True, 1: False, 2: False}),
        ("clamp", {None: False, -1: True, 0: True, 1: False}),
        ("cap", {None: True, -1: True, 1: True}),
        ("project_out", {None: True, 1: True, -1: False}),
    ],
)
def test_an_attribute_that_is_taken_away_is_not_wanted(op: Any, strengths: dict[float | None, bool]) -> None:
    for strength, absent in strengths.items():
        assert unwanted(Intervention(attribute=A, op=op, strength=strength)) == absent


@pytest.mark.parametrize(
    ("steering", "param", "said"),
    [
        ({"rank": [A, B, A]}, "steering.rank[2]", "named before"),
        ({"rank": [A, f"-{A}"]}, "steering.rank[1]", "named before"),
        (pushes({}, {"strength": -1}), "steering.interventions[1].attribute", "pushed both ways"),
    ],
)
def test_what_contradicts_itself_is_refused(steering: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        asked(steering)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("steering", "param"), [(pushes({}), "best_of"), (pushes({}) | {"rank": [f"-{A}"]}, "steering.rank")]
)
def test_an_engine_that_cannot_judge_is_complained_of_in_the_words_of_the_request(
    steering: dict[str, Any], param: str
) -> None:
    body = parse(json.dumps({"model": "text", "best_of": 4, "steering": steering}).encode(), CompletionRequest)
    found = explained(RequestError("verdicts must be left out here", "verdicts"), body)
    assert found.param == param
    assert str(found).startswith(f"{param}: no text can be judged here: verdicts must be left out here")
    assert ("is [] for the log-probability" in str(found)) == (param == "best_of")
