"""Interventions resolved: names to directions, units to hidden units; what does not fit is refused by its path."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import RequestError
from steerserve.saes import SparseAutoencoder
from tests import tiny

VALUES = tuple(float(i + 1) for i in range(tiny.HIDDEN))
VECTOR = Intervention(vector=VectorRef(1, VALUES), strength=1.0)
FEATURE = Intervention(feature=FeatureRef("layer-1-mask", 3), strength=0.5)
ATTRIBUTE = Intervention(attribute="topic/sports")
PLAIN = GenerationParams(prompt="the king", max_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path_factory.mktemp("catalogue"), max_steps=100, max_interventions=3)


def refused(served: DiffusionEngine, params: GenerationParams) -> RequestError:
    with pytest.raises(RequestError) as error:
        served.admit(params)
    return error.value


BAD_PUSHES: list[tuple[Intervention, str]] = [
    (Intervention(strength=1.0), ""),
    (replace(ATTRIBUTE, vector=VECTOR.vector), ""),
    (replace(FEATURE, vector=VECTOR.vector), ""),
    (replace(ATTRIBUTE, feature=FEATURE.feature), ""),
    (Intervention(attribute="topic/none"), ".attribute"),
    (Intervention(attribute=""), ".attribute"),
    (replace(FEATURE, feature=FeatureRef("none", 3)), ".feature.sae"),
    (replace(FEATURE, feature=FeatureRef("layer-1-mask", tiny.FEATURES)), ".feature.index"),
    (replace(FEATURE, feature=FeatureRef("layer-1-mask", -1)), ".feature.index"),
    (replace(VECTOR, vector=VectorRef(3, VALUES)), ".vector.layer"),
    (replace(VECTOR, vector=VectorRef(-1, VALUES)), ".vector.layer"),
    (replace(VECTOR, vector=VectorRef(1, VALUES[1:])), ".vector.values"),
    (replace(VECTOR, vector=VectorRef(1, ())), ".vector.values"),
    (replace(VECTOR, vector=VectorRef(1, (0.0,) * tiny.HIDDEN)), ".vector.values"),
    (replace(VECTOR, vector=VectorRef(1, (math.nan, *VALUES[1:]))), ".vector.values"),
    (replace(VECTOR, vector=VectorRef(1, (math.inf, *VALUES[1:]))), ".vector.values"),
    (replace(VECTOR, layers=(1,)), ".layers"),
    (replace(VECTOR, vector=VectorRef()), ".vector"),
    (replace(VECTOR, vector=VectorRef(layer=1)), ".vector"),
    (replace(VECTOR, vector=VectorRef(1, VALUES, "warm")), ".vector.name"),
    (replace(VECTOR, vector=VectorRef(name="cold")), ".vector.name"),
    (replace(VECTOR, vector=VectorRef(name="warm"), layers=(1,)), ".layers"),
    (replace(VECTOR, vector=VectorRef(name="warm"), op="boost"), ".op"),
    (replace(VECTOR, unit="stored"), ".unit"),
    (replace(ATTRIBUTE, strength=1.0, unit="stored"), ".unit"),
    (replace(FEATURE, layers=(1,)), ".layers"),
    (replace(ATTRIBUTE, layers=()), ".layers"),
    (replace(ATTRIBUTE, layers=(1, 2)), ".layers"),
    (replace(ATTRIBUTE, layers=(-1,)), ".layers"),
    (replace(ATTRIBUTE, strength=math.nan), ".strength"),
    (replace(ATTRIBUTE, strength=math.inf), ".strength"),
    (replace(ATTRIBUTE, strength=-math.inf), ".strength"),
    (replace(ATTRIBUTE, strength=100.5), ".strength"),
    (replace(VECTOR, strength=None), ".strength"),
    (replace(FEATURE, strength=None), ".strength"),
    (replace(ATTRIBUTE, op="clamp"), ".strength"),
    (replace(ATTRIBUTE, unit="raw"), ".strength"),
    (replace(VECTOR, strength=2e6, unit="raw"), ".strength"),
    (replace(ATTRIBUTE, strength=1.0, op="boost"), ".op"),
    (replace(VECTOR, op="multiply"), ".op"),
    (replace(ATTRIBUTE, strength=1.0, unit="max_act"), ".unit"),
    (replace(VECTOR, unit="max_act"), ".unit"),
    (replace(VECTOR, unit="kl"), ".unit"),
    (replace(FEATURE, unit="kl"), ".unit"),
    (replace(FEATURE, op="project_out", unit="raw"), ".unit"),
    (replace(FEATURE, op="boost", unit="max_act"), ".unit"),
    (replace(FEATURE, feature=FeatureRef("layer-1-mask", 0)), ".unit"),
    (replace(ATTRIBUTE, scope=(0, 13)), ".scope"),
    (replace(ATTRIBUTE, scope=(-1, 3)), ".scope"),
    (replace(ATTRIBUTE, scope=(4, 4)), ".scope"),
    (replace(ATTRIBUTE, scope=(5, 4)), ".scope"),
    (replace(ATTRIBUTE, schedule="sometimes"), ".schedule"),
    (replace(ATTRIBUTE, schedule=""), ".schedule"),
    (replace(ATTRIBUTE, schedule={}), ".schedule"),
    (replace(ATTRIBUTE, schedule={"type": "window", "start": 0.5, "stop": 0.2}), ".schedule"),
    (replace(ATTRIBUTE, schedule={"type": "uniform", "norm": "max"}), ".schedule"),
    (replace(ATTRIBUTE, schedule={"type": "uniform", "norm": "kl"}), ".schedule"),
    (replace(VECTOR, schedule="commitment"), ".schedule"),
]


@pytest.mark.parametrize(("push", "at"), BAD_PUSHES, ids=lambda one: str(one)[:60])
def test_a_bad_intervention_is_refused_by_its_path(served: DiffusionEngine, push: Intervention, at: str) -> None:
    error = refused(served, replace(PLAIN, interventions=(ATTRIBUTE, push)))
    assert error.param == f"interventions[1]{at}"


def test_names_that_are_not_checked_by_type_are_refused(served: DiffusionEngine) -> None:
    for field, value in (("unit", "watts"), ("unit", ""), ("scope", "some"), ("scope", "")):
        changes: dict[str, Any] = {field: value}
        error = refused(served, replace(PLAIN, interventions=(replace(VECTOR, **changes),)))
        assert error.param == f"interventions[0].{field}"


def test_units_become_hidden_units(served: DiffusionEngine) -> None:
    sae = served.catalogue.saes["layer-1-mask"]
    assert sae.stats is not None
    largest, row = float(sae.stats.max_act[3]), sae.row_norm(3)
    for push, size in (
        (ATTRIBUTE, 0.4 * 6.0),
        (replace(ATTRIBUTE, strength=2.0), 2.0 * 6.0),
        (replace(ATTRIBUTE, strength=2.0, unit="raw"), 2.0),
        (FEATURE, 0.5 * largest * row),
        (replace(FEATURE, unit="stored"), 0.5 * row),
        (replace(FEATURE, op="clamp"), 0.5 * largest),
        (replace(FEATURE, op="cap", unit="raw"), 0.5),
        (replace(FEATURE, op="clamp", unit="stored"), 0.5),
        (replace(FEATURE, op="clamp", unit="residual"), 0.5 * 6.0 / row),
        (replace(FEATURE, unit="residual"), 0.5 * 6.0),
        (replace(FEATURE, unit="raw"), 0.5),
        (VECTOR, 6.0),
        (replace(FEATURE, op="project_out"), 0.5),
        (replace(FEATURE, op="boost"), 0.5),
        (replace(ATTRIBUTE, op="project_out", strength=0.7), 0.7),
    ):
        request = served.admit(replace(PLAIN, interventions=(push,)))
        [made] = request.pushes
        assert made.strength == pytest.approx(size)
        assert made.op == push.op
        assert float(made.direction.norm()) == pytest.approx(1)
        [site] = request.plan["interventions"][0]["sites"]
        latent = push.feature is not None and push.op in ("clamp", "cap")
        assert (site["layer"], site["strength_hidden"]) == (1, pytest.approx(size * row if latent else size))
        assert site.get("strength_activation") == (pytest.approx(size) if latent else None)


def test_a_vector_is_normalised(served: DiffusionEngine) -> None:
    [push] = served.admit(replace(PLAIN, interventions=(VECTOR,))).pushes
    torch.testing.assert_close(push.direction, tiny.unit(torch.tensor(VALUES)))


def test_an_attribute_brings_its_defaults_and_a_request_overrides_them(served: DiffusionEngine) -> None:
    plan = served.admit(replace(PLAIN, interventions=(ATTRIBUTE,))).plan["interventions"][0]
    assert (plan["strength"], plan["unit"], plan["scope"]) == (0.4, "residual", "masked")
    assert plan["schedule"]["type"] == "commitment"
    assert sum(gain**2 for gain in plan["schedule"]["gains"]) == pytest.approx(64, rel=1e-4)
    asked = replace(ATTRIBUTE, strength=1.0, scope=(2, 5), schedule="uniform", direction="diff_means")
    request = served.admit(replace(PLAIN, interventions=(asked,)))
    plan = request.plan["interventions"][0]
    assert (plan["strength"], plan["scope"], plan["direction"]) == (1.0, [2, 5], "diff_means")
    assert plan["strength_per_step"] == [1.0] * 12
    [push] = request.pushes
    assert push.scope == (request.start + 2, request.start + 5)
    sports = served.catalogue.attributes["topic/sports"]
    assert torch.equal(push.direction, sports.directions[1, "diff_means"])


WINDOW = {"type": "window", "start": 0.0, "stop": 0.25, "norm": "l2"}


@pytest.mark.parametrize(
    ("push", "peak", "neutral"),
    [
        (replace(ATTRIBUTE, strength=-0.3, schedule="uniform"), 0.3, False),
        # All of the push in a quarter of the steps: twice the gain.
        (replace(ATTRIBUTE, strength=0.3, schedule=WINDOW), 0.6, False),
        (replace(ATTRIBUTE, strength=0.0), 0.0, True),
        (replace(FEATURE, op="multiply", strength=3.0), 2.0, False),
        (replace(FEATURE, op="multiply", strength=0.0), 1.0, False),
        (replace(FEATURE, op="multiply", strength=1.0), 0.0, True),
        (replace(FEATURE, op="clamp", strength=0.0), 0.0, False),
        (replace(ATTRIBUTE, strength=0.3, schedule="feedback"), None, False),
    ],
)
def test_a_plan_states_how_hard_an_intervention_may_push(
    served: DiffusionEngine, push: Intervention, peak: float | None, neutral: bool
) -> None:
    told = served.admit(replace(PLAIN, interventions=(push,))).plan["interventions"][0]
    assert told["peak"] == (None if peak is None else pytest.approx(peak))
    assert told["neutral"] is neutral


@pytest.mark.parametrize("op", ["clamp", "project_out", "cap"])
def test_an_operator_with_a_target_never_overshoots_it(served: DiffusionEngine, op: Any) -> None:
    push = replace(ATTRIBUTE, op=op, strength=0.5)
    for schedule in (None, "commitment", {"type": "piecewise", "preset": "ramp_up"}):
        [made] = served.admit(replace(PLAIN, interventions=(replace(push, schedule=schedule),))).pushes
        assert float(made.gains.max()) == pytest.approx(1)
    narrow = {"type": "window", "start": 0.0, "stop": 0.25, "norm": "l2"}
    error = refused(served, replace(PLAIN, interventions=(replace(push, schedule=narrow),)))
    assert error.param == "interventions[0].schedule"
    assert "at most 1" in str(error)


def test_a_named_vector_pushes_at_all_of_its_layers_or_at_those_asked_for(served: DiffusionEngine) -> None:
    warm = served.catalogue.vectors["warm"]
    named = Intervention(vector=VectorRef(name="warm"), strength=0.5, unit="stored")
    request = served.admit(replace(PLAIN, interventions=(named, replace(named, layers=(2,), unit="raw"))))
    both, one = request.interventions
    assert [(push.layer, push.strength) for push in both.pushes] == [(0, 1.5), (2, 2.0)]
    assert all(torch.equal(push.direction, warm.layers[push.layer]) for push in both.pushes)
    assert [(push.layer, push.strength) for push in one.pushes] == [(2, 0.5)]
    assert both.summary["name"] == "warm"
    assert both.summary["unit"] == "stored"


def test_a_unit_that_is_not_named_is_one_that_is_known(tmp_path: Path) -> None:
    asked = (FEATURE, VECTOR, Intervention(vector=VectorRef(name="warm"), strength=1.0))

    def units(engine: DiffusionEngine) -> list[str]:
        return [engine.admit(replace(PLAIN, interventions=(one,))).interventions[0].summary["unit"] for one in asked]

    bare = tiny.engine(tiny.bert(), tmp_path)
    saes = {
        name: SparseAutoencoder(sae.facts, dict(sae.named_buffers()), sae.activation)
        for name, sae in bare.catalogue.saes.items()
    }
    assert units(bare) == ["max_act", "residual", "residual"]
    bare.catalogue = replace(bare.catalogue, saes=saes)
    assert units(bare) == ["residual", "residual", "residual"]
    with pytest.raises(RequestError, match="has no feature_stats.safetensors"):
        bare.admit(replace(PLAIN, interventions=(replace(FEATURE, unit="max_act"),)))
    bare.catalogue = replace(bare.catalogue, residual_norms={})
    assert units(bare) == ["raw", "raw", "stored"]
