"""Predicted KL: the calibrated cost of the pushes as planned and as made, by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from schedulers import CommitmentProfile
from steerserve.engine.api.events import Committed, Done
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import RequestError
from tests import tiny
from tests.engine import priced

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, ignore_eos=True)
SPORTS = Intervention(attribute="topic/sports", strength=0.8)
ARCHAIC = Intervention(attribute="register/archaic", strength=-0.5)
EARLY = {"type": "window", "start": 0.0, "stop": 0.5}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def by_hand(forwards: list[tuple[float, float]], pushes: list[tuple[tuple[float, ...], float, list[float]]]) -> float:
    """Sum over forwards at progress p that commit a share w of w K sum_i c_i(p) (a_i g_i(p))^2 / 2; gains [64]."""
    total = 0.0
    for progress, share in forwards:
        for cost, strength, gains in pushes:
            c = cost[min(int(progress * len(cost)), len(cost) - 1)]
            total += share * len(cost) * c * (strength * gains[min(int(progress * 64), 63)]) ** 2 / 2
    return total


def steps_of(request_id: str, events: list[object], length: int) -> list[tuple[float, float]]:
    """(progress, share) of each step at which something committed."""
    done, found = 0, []
    for event in events:
        if isinstance(event, Committed) and event.request_id == request_id:
            found.append((done / length, len(event.tokens) / length))
            done += len(event.tokens)
    return found


@pytest.mark.parametrize("schedule", ["uniform", "commitment", "optimal", EARLY])
def test_a_plan_predicts_the_kl_of_its_own_steps_and_the_receipt_finds_it(
    served: DiffusionEngine, schedule: object
) -> None:
    push = replace(SPORTS, schedule=schedule)  # type: ignore[arg-type]
    request, events = tiny.solo(served, replace(PLAIN, interventions=(push,)))
    assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
    plan, receipt = request.plan, events[-1].result.receipt
    gains = request.pushes[0].gains.tolist()
    expected = by_hand([(i / 6, 1 / 6) for i in range(6)], [(priced.COSTS["topic/sports"], 0.8, gains)])
    assert expected > 0
    for told in (plan, plan["interventions"][0], receipt, receipt["interventions"][0]):
        assert told["predicted_kl"] == pytest.approx(expected, rel=1e-6)
    assert plan["predicted_kl_cross_terms"] == receipt["predicted_kl_cross_terms"] == "all"


def test_steps_that_depend_on_the_run_are_charged_as_made(served: DiffusionEngine) -> None:
    push = replace(SPORTS, schedule="optimal")
    request, events = tiny.solo(served, replace(PLAIN, transfer="origin", order="random", interventions=(push,)))
    assert isinstance(events[-1], Done) and events[-1].result.receipt is not None
    pushed = [(priced.COSTS["topic/sports"], 0.8, request.pushes[0].gains.tolist())]
    made = steps_of(request.id, list(events), 12)
    assert {share for _, share in made} != {1 / 6}
    assert events[-1].result.receipt["predicted_kl"] == pytest.approx(by_hand(made, pushed), rel=1e-6)
    # Beforehand, as if each slice of progress had a forward of its own.
    fine = by_hand([(k / 64, 1 / 64) for k in range(64)], pushed)
    assert request.plan["predicted_kl"] == pytest.approx(fine, rel=1e-6)


def test_a_cost_on_a_coarser_grid_is_the_same_cost(tmp_path: Path) -> None:
    coarse = (0.02, 0.01, 0.005, 0.005)
    served = priced.engine(
        tiny.bert(), tmp_path, together=False, sports=tuple(c / 16 for c in coarse for _ in range(16))
    )
    found = []
    for cost in (coarse, coarse[::-1]):
        attribute = served.catalogue.attributes["topic/sports"]
        profile = CommitmentProfile((0.0, 0.5, 1.0, 1.0, 1.0), cost=cost).to_json()
        changed = replace(served.catalogue, attributes={"topic/sports": replace(attribute, profile=profile)})
        engine = DiffusionEngine(served.model, served.tokenizer, changed, served.config)
        params = replace(PLAIN, transfer="origin", order="random", interventions=(SPORTS,))
        found.append(engine.admit(params).plan["predicted_kl"])
    same = served.admit(replace(PLAIN, transfer="origin", order="random", interventions=(SPORTS,))).plan["predicted_kl"]
    assert found == pytest.approx([same, sum(coarse) * 0.8**2 / 2])


def test_cross_terms_are_the_joint_profile_s(served: DiffusionEngine) -> None:
    def told(*pushes: Intervention) -> tuple[float, str]:
        plan = served.admit(replace(PLAIN, steps=12, interventions=pushes)).plan
        return plan["predicted_kl"], plan["predicted_kl_cross_terms"]

    warm = Intervention(attribute="tone/warm", strength=1.0)
    alone = [told(one)[0] for one in (SPORTS, ARCHAIC, warm)]
    a, b = (torch.tensor(priced.COSTS[name]) for name in ("topic/sports", "register/archaic"))
    at = [int(i / 12 * 64) for i in range(12)]
    cross = float((0.25 * (a * b).sqrt())[at].sum()) * 64 / 12 * 0.8 * -0.5
    both, said = told(SPORTS, ARCHAIC)
    assert said == "all"
    assert both == pytest.approx(alone[0] + alone[1] + cross, rel=1e-5)
    assert both < alone[0] + alone[1]
    # Two pushes of one attribute are one push of their sum.
    for pushes, expected, known in (
        ((SPORTS, ARCHAIC, warm), both + alone[2], "some"),
        ((SPORTS, warm), alone[0] + alone[2], "none"),
        ((SPORTS, SPORTS), 4 * alone[0], "all"),
    ):
        found, said = told(*pushes)
        assert found == pytest.approx(expected, rel=1e-5)
        assert said == known


def test_no_number_is_made_up_where_no_cost_was_calibrated(served: DiffusionEngine) -> None:
    vector = Intervention(vector=VectorRef(1, tuple(range(1, tiny.HIDDEN + 1))), strength=1.0)
    unknown = [
        Intervention(attribute="plain", strength=0.5),
        vector,
        Intervention(feature=FeatureRef("layer-1-mask", 3), strength=0.5),
        replace(SPORTS, direction="diff_means"),
        replace(SPORTS, scope="all"),
        replace(SPORTS, op="clamp"),
        replace(ARCHAIC, layers=(0,)),
        replace(ARCHAIC, unit="raw"),
    ]
    for push in unknown:
        [(request, result)] = tiny.run(served, replace(PLAIN, interventions=(SPORTS, push)))
        assert result.receipt is not None
        for told in (request.plan, result.receipt):
            assert told["predicted_kl"] is None
            assert told["interventions"][0]["predicted_kl"] > 0
            assert told["interventions"][1]["predicted_kl"] is None
        assert "no predicted KL" in request.plan["interventions"][1]["notes"][-1]
        error = refused(served, replace(push, unit="kl", strength=0.1))
        assert error.param in ("interventions[0].unit", "interventions[0].strength") or push.unit == "raw"
    guided = served.admit(replace(PLAIN, cfg_scale=1.0, interventions=(SPORTS,)))
    assert guided.plan["predicted_kl"] is None


def refused(served: DiffusionEngine, push: Intervention) -> RequestError:
    try:
        served.admit(replace(PLAIN, interventions=(push,)))
    except RequestError as error:
        return error
    return RequestError("none")


def test_raw_strengths_go_through_the_residual_norm(served: DiffusionEngine) -> None:
    norm = served.catalogue.attributes["topic/sports"].sites[1].residual_norm
    raw = replace(SPORTS, unit="raw", strength=0.8 * norm)
    plans = [served.admit(replace(PLAIN, interventions=(one,))).plan for one in (SPORTS, raw)]
    assert plans[0]["predicted_kl"] == pytest.approx(plans[1]["predicted_kl"])


def test_nats_are_the_uniform_push_that_costs_them(served: DiffusionEngine) -> None:
    for nats in (0.01, -0.01):
        push = Intervention(attribute="tone/warm", strength=nats, unit="kl")
        [(request, result)] = tiny.run(served, replace(PLAIN, interventions=(push,)))
        strength = math.copysign(math.sqrt(2 * 0.01 / sum(priced.COSTS["tone/warm"])), nats)
        assert request.pushes[0].strength == pytest.approx(strength * 7.0)
        assert result.receipt is not None
        for told in (request.plan["interventions"][0], result.receipt["interventions"][0]):
            assert (told["strength"], told["unit"]) == (nats, "kl")
            assert told["came_to"] == {"strength": pytest.approx(strength), "unit": "residual", "by": "predicted_kl"}
            assert told["predicted_kl"] == pytest.approx(0.01)
            assert told["strength_per_step"] == pytest.approx([strength] * 6, abs=1e-6)
    huge = refused(served, Intervention(attribute="tone/warm", strength=100.5, unit="kl"))
    assert (huge.param, "100" in str(huge)) == ("interventions[0].strength", True)
    none = refused(served, Intervention(attribute="tone/warm", unit="kl"))
    assert none.param == "interventions[0].strength"
    guided = pytest.raises(RequestError, match="without guidance")
    with guided:
        served.admit(replace(PLAIN, cfg_scale=1.0, interventions=(replace(SPORTS, unit="kl"),)))


def test_the_peak_of_nats_goes_with_the_square_of_the_gain(served: DiffusionEngine) -> None:
    half = {"type": "window", "start": 0.0, "stop": 0.5, "norm": "l2"}
    push = Intervention(attribute="tone/warm", strength=-0.01, unit="kl", schedule=half)
    assert served.admit(replace(PLAIN, interventions=(push,))).plan["interventions"][0]["peak"] == pytest.approx(0.02)


@pytest.mark.parametrize("unit", ["residual", "kl"])
def test_a_limit_on_the_prediction_scales_every_number_of_a_push(served: DiffusionEngine, unit: Any) -> None:
    push = Intervention(attribute="tone/warm", strength=0.9, unit=unit)
    whole, less = (
        served.admit(replace(PLAIN, interventions=(push,), limits=limits))
        for limits in (None, Limits(max_predicted_kl=0.001))
    )
    factor = less.plan["limits"]["predicted_kl_scale"]
    assert 0 < factor < 1
    assert less.pushes[0].strength == pytest.approx(factor * whole.pushes[0].strength)
    before, after = (one.plan["interventions"][0] for one in (whole, less))
    assert after["strength"] == pytest.approx(before["strength"] * (factor**2 if unit == "kl" else factor))
    assert after["peak"] == pytest.approx(after["strength"])
    assert after["strength_per_step"] == pytest.approx([factor * one for one in before["strength_per_step"]], abs=1e-6)
    assert after["predicted_kl"] == pytest.approx(0.001)


def test_what_was_replaced_while_it_ran_is_charged_for_its_own_steps(served: DiffusionEngine) -> None:
    request = served.admit(replace(PLAIN, interventions=(SPORTS,)))
    served.add([request])
    events = served.step() + served.step()
    warm = Intervention(attribute="tone/warm", strength=1.0)
    served.steer(request.id, served.admit(replace(PLAIN, interventions=(warm,))))
    events += tiny.drain(served)
    receipt = tiny.results(events)[request.id].receipt
    assert receipt is not None
    ones = [1.0] * 64
    early = by_hand([(0.0, 1 / 6), (1 / 6, 1 / 6)], [(priced.COSTS["topic/sports"], 0.8, ones)])
    late = by_hand([(i / 6, 1 / 6) for i in range(2, 6)], [(priced.COSTS["tone/warm"], 1.0, ones)])
    assert [one["predicted_kl"] for one in receipt["interventions"]] == pytest.approx([early, late])
    assert receipt["predicted_kl"] == pytest.approx(early + late)
