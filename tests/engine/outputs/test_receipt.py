"""What receipts say beside the numbers: nothing that is true of the plan alone, and why nothing was pushed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits
from steerserve.engine.engine import DiffusionEngine
from steerserve.steering.bounds import LARGEST_LATENT
from tests import tiny
from tests.engine import priced

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, temperature=1.0, ignore_eos=True)
PRICED = Intervention(attribute="topic/sports", strength=2.0, schedule="uniform")
FEATURE = Intervention(feature=FeatureRef("layer-1-mask", 7), strength=4.0, unit="raw")
REMDM: dict[str, Any] = {"type": "remdm", "eta": 0.2, "schedule": "cap"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def pushed(served: DiffusionEngine, params: GenerationParams) -> dict[str, Any]:
    """What the receipt says of the one intervention, and the plan in `plan`."""
    [(request, result)] = tiny.run(served, params)
    assert result.receipt is not None
    [told], [plan] = result.receipt["interventions"], request.plan["interventions"]
    return {**told, "plan": plan}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transfer": REMDM}, "no predicted KL"),
        ({"remask_when": {"condition": {"progress": {"at_least": 1.0}}, "span": "block"}}, "no predicted KL"),
        ({"interventions": (replace(PRICED, schedule={"type": "feedback"}),)}, "of the most it may push"),
        ({"interventions": (replace(PRICED, when={"progress": {"below": 0.5}}),)}, "of the most it may push"),
    ],
    ids=["remdm", "remasked", "feedback", "condition"],
)
def test_what_only_the_plan_does_not_know_is_not_said_beside_what_it_came_to(
    served: DiffusionEngine, changes: dict[str, Any], said: str
) -> None:
    told = pushed(served, replace(PLAIN, **({"interventions": (PRICED,)} | changes)))
    assert told["predicted_kl"] > 0
    assert said in told["plan"]["notes"][-1]
    assert not any("predicted KL" in note for note in told["notes"])


@pytest.mark.parametrize(
    ("one", "limits", "why"),
    [
        (replace(FEATURE, op="cap", strength=1e4), None, "no position of the scope needed it"),
        (
            replace(FEATURE, scope="committed", schedule={"type": "window", "start": 0.0, "stop": 0.01}),
            None,
            "none was there",
        ),
        (replace(FEATURE, when={"progress": {"above": 1.0}}), None, "none was there"),
        (FEATURE, Limits(max_kl=1e-30), "a limit on KL left nothing of it"),
        (PRICED, Limits(max_kl=1e-12), "a limit on KL left nothing of it"),
    ],
    ids=["cap", "scope", "condition", "limit", "priced"],
)
def test_a_push_that_changed_nothing_says_why(
    served: DiffusionEngine, one: Intervention, limits: Limits | None, why: str
) -> None:
    told = pushed(served, replace(PLAIN, interventions=(one,), limits=limits))
    assert not told["applied"]
    [note] = [note for note in told["notes"] if note.startswith("nothing was changed")]
    assert why in note


@pytest.mark.parametrize("op", ["multiply", "clamp"])
def test_a_strength_of_0_that_takes_something_away_is_applied(served: DiffusionEngine, op: Any) -> None:
    feature = FeatureRef("layer-1-mask", 5)
    unit: Any = None if op == "multiply" else "raw"
    one = replace(Intervention(feature=feature, strength=0.0, scope="all"), op=op, unit=unit)
    told = pushed(served, replace(PLAIN, interventions=(one,)))
    assert told["applied"]
    for notes in (told["notes"], told["plan"]["notes"]):
        assert not any("not applied" in note for note in notes)
    never = replace(one, schedule={"type": "window", "start": 0.999, "stop": 1.0, "norm": "peak"})
    told = pushed(served, replace(PLAIN, interventions=(never,)))
    assert not told["applied"]
    assert "no step falls where the schedule pushes: not applied" in told["plan"]["notes"]


def test_a_clamp_that_its_encoder_can_never_read_says_so(tmp_path: Path) -> None:
    """Of a TopK, where others read more of the feature's decoder row than it does."""
    served = priced.engine(tiny.bert(), tmp_path)
    sae = served.catalogue.saes["layer-1-mask"]
    reads = [feature for feature in range(1, tiny.FEATURES) if sae.reads_back(feature)]
    assert {sae.reached(feature) for feature in reads} == {True, False}
    for feature in reads:
        clamp = replace(FEATURE, feature=FeatureRef("layer-1-mask", feature), op="clamp", strength=50.0)
        for one in (clamp, replace(clamp, strength=0.0), replace(clamp, op="cap")):
            notes = served.admit(replace(PLAIN, interventions=(one,))).plan["interventions"][0]["notes"]
            assert any("leaves feature" in note for note in notes) == (one is clamp and not sae.reached(feature))


def test_a_clamp_that_is_held_says_so(served: DiffusionEngine) -> None:
    """And is no position that the caller's own limit made smaller."""
    clamp = replace(FEATURE, op="clamp", strength=3e3)
    asked = replace(PLAIN, interventions=(clamp,), measure_kl=True, limits=Limits(max_kl=1e3))
    [(_, result)] = tiny.run(served, asked)
    assert result.receipt is not None
    [told] = result.receipt["interventions"]
    [site] = told["sites"]
    assert site["positions_clipped"] == site["positions_touched"] > 0
    assert site["delta_ratio_max"] == pytest.approx(LARGEST_LATENT)
    assert told["clipped"] == 1
    assert any("the latent was not set everywhere" in note for note in told["notes"])
    assert result.receipt["limits"]["clipped"]["delta_positions"] == 0
    for within in (
        replace(PLAIN, interventions=(replace(clamp, strength=0.5),)),
        replace(asked, limits=Limits(max_delta=0.5)),
    ):
        told = pushed(served, within)
        assert told["sites"][0]["delta_ratio_max"] < LARGEST_LATENT
        assert not any("not set everywhere" in note for note in told["notes"])
