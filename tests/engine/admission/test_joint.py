"""Interventions allocated together: the joint gains in force, and what cannot be allocated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from schedulers import CommitmentProfile, build_strength, compile_gains, compile_joint
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import TorchEngine
from steerserve.errors import RequestError
from tests import tiny
from tests.engine import priced

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, ignore_eos=True, combine="joint")
SPORTS = Intervention(attribute="topic/sports", strength=0.8)
ARCHAIC = Intervention(attribute="register/archaic", strength=0.5)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def test_the_gains_are_the_joint_profile_s(served: TorchEngine) -> None:
    for _ in range(2):
        [(request, result)] = tiny.run(served, replace(PLAIN, interventions=(ARCHAIC, SPORTS)))
        table = compile_joint(priced.joint().of(("register/archaic", "topic/sports")), (0.5, 0.8))
        archaic, sports = request.interventions
        assert [push.gains.tolist() for push in archaic.pushes] == [table.gains[0].tolist()] * 2
        assert [push.gains.tolist() for push in sports.pushes] == [table.gains[1].tolist()]
        assert result.receipt is not None
        assert result.receipt["combine"] == "joint"
        assert request.plan["joint"]["rho"] == table.rho > 1
        assert request.plan["joint"]["attributes"] == ["register/archaic", "topic/sports"]
        for told, gains in zip(result.receipt["interventions"], table.gains.tolist(), strict=True):
            assert (told["schedule"]["type"], told["schedule"]["norm"], told["rho"]) == ("joint", "kl", table.rho)
            assert told["schedule"]["gains"] == pytest.approx(gains, abs=1e-6)


def test_it_costs_what_the_uniform_pushes_cost_and_moves_further(served: TorchEngine) -> None:
    """On one forward a slice the predicted KL, cross terms and all, is that of the uniform pushes."""
    params = replace(PLAIN, transfer="origin", order="random", interventions=(SPORTS, ARCHAIC))
    uniform = served.admit(replace(params, combine="independent")).plan
    together = served.admit(params).plan
    assert together["predicted_kl"] == pytest.approx(uniform["predicted_kl"], rel=1e-5)
    assert together["predicted_kl_cross_terms"] == "all"

    def moved(plan: dict[str, Any]) -> float:
        weights = together["joint"]["weights"]
        total: float = sum(
            weight * one["strength"] * sum(s * g for s, g in zip(priced.sensitivity(one["name"]), gains, strict=True))
            for weight, one in zip(weights, plan["interventions"], strict=True)
            for gains in [one["schedule"]["gains"]]
        )
        return total

    assert moved(together) / moved(uniform) == pytest.approx(together["joint"]["rho"], rel=1e-4)


def test_one_alone_is_its_optimal_schedule_and_none_is_nothing(served: TorchEngine) -> None:
    request = served.admit(replace(PLAIN, interventions=(SPORTS,)))
    profile = CommitmentProfile.from_json(priced.profile("topic/sports"))
    optimal = compile_gains(*build_strength("optimal"), profile)
    torch.testing.assert_close(request.pushes[0].gains, optimal.gains)
    plain = replace(PLAIN, combine="independent")
    assert tiny.tokens_of(served, PLAIN) == tiny.tokens_of(served, plain)


def test_units_are_each_attribute_s_own(served: TorchEngine) -> None:
    nats = sum(priced.COSTS["register/archaic"]) * 0.5**2 / 2
    other = (replace(SPORTS, strength=0.8 * 6.0, unit="raw"), replace(ARCHAIC, strength=nats, unit="kl"))
    requests = [served.admit(replace(PLAIN, interventions=pair)) for pair in ((SPORTS, ARCHAIC), other)]
    for one, same in zip(*(request.pushes for request in requests), strict=True):
        torch.testing.assert_close(one.gains, same.gains)
        assert one.strength == pytest.approx(same.strength)


@pytest.mark.parametrize(
    ("push", "at"),
    [
        (Intervention(vector=VectorRef(1, tuple(range(1, tiny.HIDDEN + 1))), strength=1.0), "interventions[1]"),
        (Intervention(feature=FeatureRef("layer-1-mask", 3), strength=1.0), "interventions[1]"),
        (Intervention(attribute="tone/warm", strength=1.0), "interventions[1].attribute"),
        (SPORTS, "interventions[1].attribute"),
        (replace(ARCHAIC, schedule="uniform"), "interventions[1].schedule"),
        (replace(ARCHAIC, op="clamp", unit="residual"), "interventions[1]"),
        (replace(ARCHAIC, layers=(0,)), "interventions[1]"),
        (replace(ARCHAIC, direction="diff_means"), "interventions[1]"),
        (replace(ARCHAIC, scope="all"), "interventions[1]"),
        (replace(ARCHAIC, strength=3.0, unit="raw"), "interventions[1]"),
        (replace(ARCHAIC, strength=0.0), "interventions[1].strength"),
        (replace(ARCHAIC, strength=-5.0), "combine"),
    ],
)
def test_what_was_not_calibrated_together_is_refused(served: TorchEngine, push: Intervention, at: str) -> None:
    with pytest.raises(RequestError) as error:
        served.admit(replace(PLAIN, interventions=(SPORTS, push)))
    assert error.value.param == at


def test_layers_and_scope_that_are_its_own_may_be_named(served: TorchEngine) -> None:
    served.admit(replace(PLAIN, interventions=(SPORTS, replace(ARCHAIC, layers=(2, 0), scope="masked"))))


def test_without_a_joint_profile_there_is_no_allocation(tmp_path: Path) -> None:
    served = priced.engine(tiny.bert(), tmp_path, together=False)
    with pytest.raises(RequestError, match="joint.json") as error:
        served.admit(replace(PLAIN, interventions=(SPORTS, ARCHAIC)))
    assert error.value.param == "combine"


def test_what_is_not_the_caller_s_own_keeps_its_schedule(served: TorchEngine) -> None:
    imposed = replace(ARCHAIC, schedule="uniform", mandatory=True)
    request = served.admit(replace(PLAIN, interventions=(SPORTS, imposed)))
    assert request.pushes[1].gains.tolist() == [1.0] * 64
    assert request.plan["joint"]["attributes"] == ["topic/sports"]
