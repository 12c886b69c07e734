"""Beside a mandatory push no other is louder, whichever way it points and however many layers it is spread over."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.server.auth.policy import Policy
from steerserve.server.errors import PolicyError
from tests.server.planned_engine import GAINS, PlannedEngine

MANDATORY = Intervention(attribute="topic/sports", strength=0.6, schedule="uniform", layers=(2, 3))
LIMIT = {"residual": 1.0}
Own = tuple[float, int, str]


def judge(policy: Policy, *own: Intervention, without: str | None = None) -> None:
    params = GenerationParams(prompt="a", max_tokens=8, interventions=own)
    plan = PlannedEngine({}).admit(policy.apply(params)).plan
    if without is not None:
        for one in plan["interventions"]:
            del one[without]
    policy.check(params, plan)


def push(strength: float, layers: int = 1, schedule: str = "uniform", **fields: Any) -> Intervention:
    return Intervention(
        attribute="sentiment/positive", strength=strength, schedule=schedule, layers=tuple(range(layers)), **fields
    )


@given(
    st.lists(
        st.tuples(st.floats(-0.2, 0.2), st.integers(1, 4), st.sampled_from(["uniform", "window"])),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.25, 0.5, 1.0]),
)
def test_every_push_counts_at_each_of_its_layers_and_at_its_peak(own: list[Own], share: float) -> None:
    policy = Policy(mandatory=(MANDATORY,), max_strength={"residual": 100.0}, max_loudness=share)
    pushes = [push(*one) for one in own]
    total = sum(abs(strength) * layers * max(GAINS[schedule]) for strength, layers, schedule in own)
    if total <= share * 1.2:
        judge(policy, *pushes)
    elif total > share * 1.2 + 1e-6:
        with pytest.raises(PolicyError, match="as large") as error:
            judge(policy, *pushes)
        assert error.value.param == "interventions"


def test_the_smallest_mandatory_push_is_what_counts() -> None:
    small = Intervention(attribute="topic/sports", strength=0.2, schedule="uniform")
    policy = Policy(mandatory=(MANDATORY, small), max_strength=LIMIT)
    judge(policy, push(0.1))
    with pytest.raises(PolicyError, match=r"1\.5 times as large"):
        judge(policy, push(0.3))


def test_an_engine_that_tells_no_sizes_is_not_trusted() -> None:
    policy = Policy(mandatory=(MANDATORY,), max_strength=LIMIT)
    judge(policy, without="sites")
    with pytest.raises(PolicyError, match="how large"):
        judge(policy, push(0.01), without="sites")


def test_where_nothing_is_mandatory_there_is_no_such_limit() -> None:
    judge(Policy(max_strength=LIMIT), push(1.0, 4), without="sites")
