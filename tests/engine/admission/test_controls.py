"""Controls: another direction, as hard, at the same times, in the same places."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerserve.engine.admission.interventions.controls import another_feature, random_direction
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import TorchEngine
from steerserve.errors import RequestError
from tests import tiny
from tests.engine import priced

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, ignore_eos=True)
ARCHAIC = Intervention(attribute="register/archaic", strength=0.5, schedule="commitment")
VECTOR = Intervention(vector=VectorRef(1, tuple(range(1, tiny.HIDDEN + 1))), strength=2.0, unit="raw")
FEATURE = Intervention(feature=FeatureRef("layer-1-mask", 3), strength=1.5, op="multiply")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return priced.engine(tiny.bert(), tmp_path_factory.mktemp("priced"))


def test_a_random_direction_is_of_the_same_size_and_the_seed_s(served: TorchEngine) -> None:
    asked = replace(PLAIN, interventions=(ARCHAIC, VECTOR))
    plain = served.admit(asked)
    controlled, again, other = (
        served.admit(replace(asked, control="random", seed=seed, row=row)) for seed, row in ((3, 0), (3, 5), (4, 0))
    )
    for push, control, same, different in zip(
        *(request.pushes for request in (plain, controlled, again, other)), strict=True
    ):
        assert (push.layer, push.strength, push.op, push.scope) == (
            control.layer,
            control.strength,
            control.op,
            control.scope,
        )
        assert torch.equal(push.gains, control.gains)
        assert float(control.direction.norm()) == pytest.approx(1)
        assert torch.equal(control.direction, same.direction)
        assert abs(float(control.direction @ push.direction)) < 0.7
        assert abs(float(control.direction @ different.direction)) < 0.7
    first, second, vector = (push.direction for push in controlled.pushes)
    assert torch.equal(first, second)
    assert abs(float(first @ vector)) < 0.7
    for one in controlled.plan["interventions"]:
        assert (one["control"], one["predicted_kl"]) == ("random", None)
    assert controlled.plan["control"] == "random"


def test_random_directions_are_spread_evenly() -> None:
    drawn = torch.stack([random_direction(seed, 0, 16) for seed in range(800)]).double()
    assert float(drawn.mean(0).abs().max()) < 0.03
    torch.testing.assert_close(drawn.T @ drawn / 800 * 16, torch.eye(16, dtype=torch.float64), atol=0.15, rtol=0)


def test_a_flipped_sign_takes_away_what_the_push_adds(served: TorchEngine) -> None:
    asked = replace(PLAIN, interventions=(ARCHAIC, FEATURE))
    plain, flipped = served.admit(asked), served.admit(replace(asked, control="sign_flip"))
    for push, control in zip(plain.pushes[:2], flipped.pushes[:2], strict=True):
        assert control.strength == -push.strength
        assert torch.equal(control.direction, push.direction)
    assert flipped.pushes[2].strength == pytest.approx(0.5)
    told = flipped.plan["interventions"]
    assert (told[0]["strength"], told[0]["control"]) == (-0.5, "sign_flip")
    assert told[0]["predicted_kl"] == plain.plan["interventions"][0]["predicted_kl"] > 0
    negative = replace(PLAIN, interventions=(replace(ARCHAIC, strength=-0.5),))
    controlled = replace(PLAIN, interventions=(ARCHAIC,), control="sign_flip")
    assert tiny.tokens_of(served, controlled) == tiny.tokens_of(served, negative)


def test_a_matched_norm_is_another_feature_of_the_same_sae(served: TorchEngine) -> None:
    asked = replace(PLAIN, interventions=(ARCHAIC, FEATURE), control="matched_norm")
    request = served.admit(asked)
    plain = served.admit(replace(asked, control=None))
    for push, one in zip(request.pushes, plain.pushes, strict=True):
        sae = served.catalogue.saes[f"layer-{push.layer}-mask"]
        cosines = torch.stack([sae.direction(i) for i in range(tiny.FEATURES)]) @ push.direction
        assert float(cosines.max()) == pytest.approx(1, abs=1e-5)
        assert int(cosines.argmax()) not in (0, 3)
        assert push.strength == one.strength
        told = [site for entry in request.plan["interventions"] for site in entry["sites"]]
        assert f"layer-{push.layer}-mask:{int(cosines.argmax())}" in [site["control_feature"] for site in told]


def test_another_feature_is_any_live_one_but_its_own() -> None:
    sae = tiny.sae(1)
    found = {another_feature(sae, frozenset({3, 5}), seed, 0) for seed in range(2000)}
    assert found == set(range(1, tiny.FEATURES)) - {3, 5}
    with pytest.raises(RequestError, match="no other feature"):
        another_feature(sae, frozenset(range(1, tiny.FEATURES)), 0, 0)


@pytest.mark.parametrize("op", ["clamp", "project_out", "cap"])
def test_pushes_whose_size_is_the_state_s_have_no_control(served: TorchEngine, op: str) -> None:
    push = replace(VECTOR, op=op, unit=None if op == "project_out" else "raw")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="does not depend on their direction") as error:
        served.admit(replace(PLAIN, interventions=(push,), control="random"))
    assert error.value.param == "control"


def test_what_the_run_decides_has_no_control(served: TorchEngine) -> None:
    push = Intervention(attribute="topic/sports", strength=0.5, schedule="feedback")
    with pytest.raises(RequestError, match="known beforehand") as error:
        served.admit(replace(PLAIN, interventions=(push,), control="random"))
    assert error.value.param == "control"


def test_a_matched_norm_needs_an_sae(served: TorchEngine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="of none"):
        served.admit(replace(PLAIN, interventions=(VECTOR,), control="matched_norm"))
    bare = priced.engine(tiny.bert(), tmp_path)
    bare.catalogue = replace(bare.catalogue, saes={})
    with pytest.raises(RequestError, match="not loaded"):
        bare.admit(replace(PLAIN, interventions=(ARCHAIC,), control="matched_norm"))
    with pytest.raises(RequestError, match="control must be one of"):
        served.admit(replace(PLAIN, control="shuffled"))  # type: ignore[arg-type]


@pytest.mark.parametrize("control", ["random", "sign_flip", "matched_norm"])
def test_what_is_not_the_caller_s_own_is_left_as_it_is(served: TorchEngine, control: str) -> None:
    imposed = replace(ARCHAIC, mandatory=True)
    asked = replace(PLAIN, interventions=(FEATURE, imposed), control=control)  # type: ignore[arg-type]
    request, plain = served.admit(asked), served.admit(replace(asked, control=None))
    for push, one in zip(request.pushes[1:], plain.pushes[1:], strict=True):
        assert torch.equal(push.direction, one.direction)
        assert push.strength == one.strength
    assert "control" not in request.plan["interventions"][1]
