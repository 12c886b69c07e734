import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, TraceParams, VectorRef
from steerserve.server.auth.policy import Policy
from steerserve.server.errors import PolicyError
from tests.server.planned_engine import PlannedEngine

SPORTS = Intervention(attribute="topic/sports", strength=0.3, schedule="uniform")
POSITIVE = Intervention(attribute="sentiment/positive", strength=0.2)


def asked(*interventions: Intervention, **fields: Any) -> GenerationParams:
    return GenerationParams(prompt="a", max_tokens=8, interventions=interventions, **fields)


def judge(policy: Policy, params: GenerationParams, engine: PlannedEngine | None = None) -> GenerationParams:
    applied = policy.apply(params)
    policy.check(params, (engine or PlannedEngine({})).admit(applied).plan)
    return applied


def test_the_default_allows_everything() -> None:
    params = asked(SPORTS, Intervention(vector=VectorRef(1, (1.0,)), op="clamp", strength=99.0), cfg_scale=2.0)
    assert judge(Policy(), params) is params


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (asked(POSITIVE, SPORTS), "interventions[1].attribute"),
        (asked(trace=TraceParams(("sentiment/positive", "topic/sports"))), "trace.attributes[1]"),
        (asked(verdicts=("sentiment/positive", "topic/sports")), "verdicts[1]"),
        (asked(order={"type": "sae_attribute", "attribute": "topic/sports"}), "order"),
        (asked(transfer={"type": "x", "deep": [{"attributes": ["topic/sports"]}]}), "transfer"),
        (
            asked(dataclasses.replace(POSITIVE, schedule={"type": "x", "attribute": "topic/sports"})),
            "interventions[0].schedule",
        ),
        (
            asked(dataclasses.replace(POSITIVE, when={"not": {"attribute": "topic/sports", "above": 0.1}})),
            "interventions[0].when",
        ),
        (asked(abort_when={"any": [{"attribute": "topic/sports", "above": 0.1}]}), "abort_when"),
        (asked(remask_when={"condition": {"attribute": "topic/sports", "above": 0.1}}), "remask_when"),
        (asked(Intervention(feature=FeatureRef("layer-1", 3), strength=1.0)), "interventions[0].feature"),
        (asked(Intervention(vector=VectorRef(1, (1.0,)), strength=1.0)), "interventions[0].vector"),
        (asked(dataclasses.replace(POSITIVE, op="clamp")), "interventions[0].op"),
    ],
)
def test_what_is_denied_is_denied_wherever_it_is_named(params: GenerationParams, param: str) -> None:
    policy = Policy(denied_attributes=("topic/*",), vectors=False, features=False, operators=("add",))
    with pytest.raises(PolicyError) as error:
        policy.apply(params)
    assert error.value.param == param


@given(
    st.lists(
        st.tuples(st.floats(-2, 2), st.sampled_from(["uniform", "window"])),
        min_size=1,
        max_size=5,
    )
)
def test_peaks_add_up_to_the_limit_at_most(pushes: list[tuple[float, str]]) -> None:
    params = asked(*(dataclasses.replace(SPORTS, strength=s, schedule=schedule) for s, schedule in pushes))
    # The window's table peaks at 4.
    total = sum(abs(s) * (4.0 if schedule == "window" else 1.0) for s, schedule in pushes)
    if total <= 2.0:
        judge(Policy(max_strength={"residual": 2.0}), params)
    elif total > 2.0 + 1e-6:
        with pytest.raises(PolicyError, match="unit residual") as error:
            judge(Policy(max_strength={"residual": 2.0}), params)
        assert error.value.code == "policy"


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (dataclasses.replace(SPORTS, strength=None), "allows 0.2 in unit residual"),
        (dataclasses.replace(SPORTS, unit="raw", strength=0.1), "not in raw"),
        (dataclasses.replace(SPORTS, op="project_out", strength=0.1), "not in factor"),
        (dataclasses.replace(SPORTS, schedule="feedback", strength=0.1), "beforehand"),
        (dataclasses.replace(SPORTS, strength=-0.21), "allows 0.2"),
    ],
)
def test_defaults_other_units_and_unknown_schedules_do_not_pass_a_limit(one: Intervention, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        judge(Policy(max_strength={"residual": 0.2}), asked(one))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_nats_add_up_as_those_of_pushes_that_point_the_same_way(nats: list[float]) -> None:
    params = asked(*(dataclasses.replace(SPORTS, unit="kl", strength=one) for one in nats))
    # The KL of a push goes with the square of its size.
    total = sum(math.sqrt(one) for one in nats) ** 2
    if total <= 1.0:
        judge(Policy(max_strength={"kl": 1.0}), params)
    elif total > 1.0 + 1e-6:
        with pytest.raises(PolicyError, match="unit kl"):
            judge(Policy(max_strength={"kl": 1.0}), params)


def test_multiply_counts_from_one() -> None:
    policy = Policy(max_strength={"factor": 0.5})
    double = dataclasses.replace(SPORTS, op="multiply", strength=2.0)
    judge(policy, asked(dataclasses.replace(double, strength=1.0)))
    with pytest.raises(PolicyError, match="factor"):
        judge(policy, asked(double))
    with pytest.raises(PolicyError, match="factor"):
        judge(policy, asked(dataclasses.replace(double, strength=0.0)))


def test_a_kl_that_is_not_predicted_is_over_the_limit() -> None:
    policy = Policy(max_predicted_kl=1.0)
    judge(policy, asked())
    with pytest.raises(PolicyError, match="predicts none"):
        judge(policy, asked(SPORTS))
    policy.check(asked(SPORTS), {"interventions": [{}], "predicted_kl": 0.9})
    for predicted in (1.1, float("nan"), "0.1"):
        with pytest.raises(PolicyError, match="predicts"):
            policy.check(asked(SPORTS), {"interventions": [{}], "predicted_kl": predicted})


def test_mandatory_interventions_come_last_and_in_every_row() -> None:
    policy = Policy(mandatory=(SPORTS,), max_strength={"residual": 0.5}, max_loudness=1.0)
    imposed = dataclasses.replace(SPORTS, mandatory=True)
    assert judge(policy, asked()).interventions == (imposed,)
    assert judge(policy, asked(POSITIVE)).interventions == (POSITIVE, imposed)


def test_a_row_with_a_mandatory_intervention_may_have_a_priority() -> None:
    params = asked(priority=3)
    assert judge(Policy(mandatory=(SPORTS,)), params).priority == 3


def test_a_condition_of_the_callers_holds_for_its_own_interventions_only() -> None:
    when = {"progress": {"above": 0.5}}
    policy = Policy(mandatory=(SPORTS,), max_strength={"residual": 0.5}, max_loudness=1.0)
    params = asked(dataclasses.replace(POSITIVE, when=when), abort_when=when, remask_when={"condition": when})
    assert [one.when for one in policy.apply(params).interventions] == [when, None]
    plan = {"interventions": [{"name": "x", "scope": "masked", "operator": "add", "strength": 1.0, "when": when}]}
    with pytest.raises(PolicyError, match="has no condition"):
        policy.check_mandatory(plan)


def test_a_field_nobody_has_judged_is_refused_beside_a_mandatory_intervention() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(GenerationParams):
        louder: str | None = None
        drowned: dict[str, float] = dataclasses.field(default_factory=dict)

    policy = Policy(mandatory=(SPORTS,))
    policy.apply(Later())
    for field, value in {"louder": "prompt", "drowned": {"by": 1e-9}}.items():
        with pytest.raises(PolicyError) as error:
            policy.apply(dataclasses.replace(Later(), **{field: value}))  # type: ignore[arg-type]
        assert error.value.param == field
        Policy().apply(dataclasses.replace(Later(), **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mandatory", "policy", "said"),
    [
        (dataclasses.replace(SPORTS, scope="committed"), {}, "leaves positions out"),
        (dataclasses.replace(SPORTS, scope=(0, 3)), {}, "leaves positions out"),
        (dataclasses.replace(SPORTS, strength=0.0), {}, "does nothing"),
        (dataclasses.replace(SPORTS, op="multiply", strength=1.0), {}, "does nothing"),
        (SPORTS, {"max_strength": {"raw": 1.0}}, "another unit"),
        (SPORTS, {"max_strength": {"residual": 1.0}, "max_overlap": 0.2}, "take more than half"),
        # As large as 0.63 of it, along the whole of it.
        (
            dataclasses.replace(SPORTS, unit="kl", strength=1.0),
            {"max_strength": {"kl": 0.4}, "max_overlap": 1.0},
            "take more than half",
        ),
    ],
)
def test_mandatory_interventions_that_could_be_escaped_are_refused(
    mandatory: Intervention, policy: dict[str, Any], said: str
) -> None:
    made = Policy(mandatory=(mandatory,), **policy)
    with pytest.raises(PolicyError, match=said):
        made.check_mandatory(PlannedEngine({}).admit(asked(mandatory)).plan)
