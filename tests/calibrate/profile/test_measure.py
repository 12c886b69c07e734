"""A whole measurement of a tiny model's attributes, and what it leaves on disk."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schedulers import CommitmentProfile, build_strength, compile_gains
from steerserve.calibrate.profile import measure as module
from steerserve.calibrate.profile.measure import measure
from steerserve.calibrate.profile.pulses import PROFILE_SEED
from steerserve.calibrate.provenance import write_profile
from steerserve.calibrate.recipes import ProfileRecipe
from steerserve.calibrate.run import calibrate
from steerserve.calibrate.texts.labelled import labelled_texts
from steerserve.calibrate.texts.tasks import Task
from steerserve.config import EngineConfig, ModelConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.joint_file import load_joint
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError, SteerserveError
from steerserve.extras import install_command
from steerserve.models import load_model, load_tokenizer, weights_sha256
from steerserve.steering.attribute import Attribute, load_attributes
from steerserve.train.classifiers import Judge, train_judge
from tests import tiny
from tests.calibrate.made import TASKS, make_data, make_recipe, make_saes

SMALL: dict[str, Any] = {
    "runs": 3,
    "run_tokens": 12,
    "run_steps": 12,
    "edges": (0, 6, 20, 64),
    "canvases": 2,
    "positions": 2,
    "pulse": 20.0,
    "judge_texts": 60,
}
NAMES = sorted(task["name"] for task in TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("measurement")
    make_data(folder / "data")
    make_saes(folder / "saes", tiny_model)
    calibrate(tiny_model, folder / "saes", folder / "data", folder / "made", make_recipe(folder))
    shutil.copytree(folder / "made", folder / "out")
    measure(tiny_model, folder / "out", folder / "data", ProfileRecipe(**SMALL))
    return folder


def loaded(root: Path, model: Path) -> dict[str, Attribute]:
    return load_attributes(root, weights_sha256(model), 2, 32)


def test_every_profile_has_sensitivity_and_cost_and_its_curve_still(folder: Path, tiny_model: Path) -> None:
    before, after = loaded(folder / "made", tiny_model), loaded(folder / "out", tiny_model)
    for name, one in after.items():
        old = CommitmentProfile.from_json(before[name].profile or {})
        new = CommitmentProfile.from_json(one.profile or {})
        assert (new.curve, new.standard_error, new.samples) == (old.curve, old.standard_error, old.samples)
        assert new.sensitivity is not None and new.sensitivity_error is not None
        assert new.cost is not None and new.cost_error is not None and min(new.cost) > 0
        # One value a window.
        assert len(set(new.sensitivity[6:20])) == len(set(new.sensitivity_error[:6])) == 1
        assert compile_gains(*build_strength("optimal"), new).norm == "kl"
        assert (one.directions_sha256, one.layers, one.strength, one.sites) == (
            before[name].directions_sha256,
            before[name].layers,
            before[name].strength,
            before[name].sites,
        )
        assert {k: v for k, v in one.provenance.items() if k != "measured"} == before[name].provenance
    assert not (folder / "out" / ".profile").exists()


def test_provenance_says_how_it_was_measured(folder: Path, tiny_model: Path) -> None:
    for one in loaded(folder / "out", tiny_model).values():
        found = one.provenance["measured"]
        assert found["settings"]["recipe"]["runs"] == 3 and set(found["settings"]["files"]) == {"who"}
        assert found["sensitivity"]["windows"] == [[0, 6], [6, 20], [20, 64]] and found["sensitivity"]["pairs"] == 3
        cost = found["cost"]
        # This model hardly answers a push: one that costs enough to be seen is no longer small.
        assert cost["exact_over_fisher"] == pytest.approx(1, rel=0.3)
        assert cost["kl"] == pytest.approx(1e-3, rel=0.9)
        profile = CommitmentProfile.from_json(one.profile or {})
        assert cost["sum"] == pytest.approx(sum(profile.cost or ()), rel=1e-3)
        assert cost["nats_a_token"] == pytest.approx(cost["sum"] * one.strength**2 / 2, rel=1e-2, abs=1e-6)
        assert cost["strength_of_nats"]["0.1"] == pytest.approx((0.2 / cost["sum"]) ** 0.5, rel=1e-3)
        assert str(folder) not in json.dumps(found)


def test_the_joint_profile_is_of_the_same_costs_and_sensitivities(folder: Path, tiny_model: Path) -> None:
    attributes = loaded(folder / "out", tiny_model)
    found = load_joint(folder / "out", weights_sha256(tiny_model), attributes)
    assert found is not None and sorted(found.names) == NAMES
    for a, name in enumerate(found.names):
        profile = CommitmentProfile.from_json(attributes[name].profile or {})
        assert found.sensitivity[a] == profile.sensitivity
        assert [matrix[a][a] for matrix in found.cost] == pytest.approx(profile.cost, rel=1e-5)


def test_a_sensitivity_is_the_change_of_log_odds_between_paired_runs(folder: Path, tiny_model: Path) -> None:
    attributes = loaded(folder / "out", tiny_model)
    name, recipe = "who/king", ProfileRecipe(**SMALL)
    one, model = attributes[name], load_model(tiny_model)
    task = Task.from_json(one.provenance["task"], "task")
    judge = train_judge(labelled_texts(folder / "data", task.group, "calibrate", 60, 0), 0)
    norms = {layer: site.residual_norm for layer, site in one.sites.items()}
    engine = DiffusionEngine(
        model, load_tokenizer(tiny_model), Catalogue(model.facts, attributes, {}, norms), EngineConfig()
    )
    window = {"type": "window", "start": 6 / 64, "stop": 20 / 64}
    odds = []
    for pushes in ((), (Intervention(attribute=name, strength=20 * one.strength, schedule=window),)):
        texts = [
            tiny.run(
                engine,
                GenerationParams(
                    max_tokens=12, steps=12, seed=PROFILE_SEED, row=row, ignore_eos=True, interventions=pushes
                ),
            )[0][1].text
            for row in range(recipe.runs)
        ]
        p = judge.probability("king", texts)
        odds.append(np.log(p / (1 - p)))
    change = (odds[1] - odds[0]) / (20 * one.strength)
    found = one.provenance["measured"]["sensitivity"]
    assert found["raw"][1] == pytest.approx(change.mean(), abs=2e-6)
    assert found["errors"][1] == pytest.approx(change.std(ddof=1) / 3**0.5, abs=2e-6)


def test_each_attribute_has_a_plot(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in NAMES:
        assert (folder / "out" / name / "profile.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_measured_is_not_measured_again(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PulseRuns", None)
    found = measure(tiny_model, folder / "out", folder / "data", ProfileRecipe(**SMALL))
    assert sorted(found.names) == NAMES


def test_a_run_that_was_stopped_goes_on_and_ends_alike(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    shutil.copytree(folder / "made", root)

    def stop(root: Path, name: str, *rest: Any) -> Path:
        if name == NAMES[1]:
            raise KeyboardInterrupt
        return write_profile(root, name, *rest)

    # No plots this time: where matplotlib is missing the rest is done all the same.
    for part in [part for part in sys.modules if part.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, part)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(module, "write_profile", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_model, root, folder / "data", ProfileRecipe(**SMALL))
    assert install_command("train") in capsys.readouterr().err
    with pytest.raises(ArtifactError, match=r"\.profile was begun with another recipe: remove it"):
        measure(tiny_model, root, folder / "data", ProfileRecipe(**SMALL | {"runs": 4}))
    monkeypatch.setattr(module, "write_profile", write_profile)
    # What was found before is read, not found again: the runs of the first two attributes are not made.
    made: list[list[str]] = []

    def noted(texts: Mapping[str, Sequence[str]], seed: int) -> Judge:
        made.append(sorted(texts))
        return train_judge(texts, seed)

    monkeypatch.setattr(module, "train_judge", noted)
    measure(tiny_model, root, folder / "data", ProfileRecipe(**SMALL))
    assert made == [["crew", "king", "team"]]
    whole = loaded(folder / "out", tiny_model)
    for name, one in loaded(root, tiny_model).items():
        assert one.card() == whole[name].card()
    assert (root / "joint.json").read_bytes() == (folder / "out" / "joint.json").read_bytes()
    assert not list(root.rglob("*.png"))


def test_a_joint_profile_of_other_settings_does_not_outlive_its_parts(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    root, other = tmp_path / "out", ProfileRecipe(**SMALL | {"canvases": 3})
    shutil.copytree(folder / "out", root)
    shutil.rmtree(root / "who")
    (root / "joint.json").unlink()
    measure(tiny_model, root, folder / "data", ProfileRecipe(**SMALL))
    before = (root / "joint.json").read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_joint", stop)
        measure(tiny_model, root, folder / "data", other)
    assert not (root / "joint.json").exists()
    found = measure(tiny_model, root, folder / "data", other)
    profile = CommitmentProfile.from_json(loaded(root, tiny_model)["deed/won"].profile or {})
    assert [matrix[0][0] for matrix in found.cost] == pytest.approx(profile.cost, rel=1e-5)
    assert (root / "joint.json").read_bytes() != before


def test_other_weights_types_are_measured_anew_where_they_are_known(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    shutil.copytree(folder / "out", root)
    monkeypatch.setattr(module, "PulseRuns", None)
    with pytest.raises(TypeError):
        measure(tiny_model, root, folder / "data", ProfileRecipe(**SMALL), ModelConfig(dtype="bfloat16"))
    for path in root.rglob("attribute.json"):
        card = json.loads(path.read_text())
        for name in ("dtype", "tokenizer"):
            del card["provenance"]["measured"]["settings"][name]
        path.write_text(json.dumps(card))
    found = measure(tiny_model, root, folder / "data", ProfileRecipe(**SMALL), ModelConfig(dtype="bfloat16"))
    assert sorted(found.names) == NAMES


def test_pulses_both_ways_take_half_the_difference(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(folder / "made", root)
    shutil.rmtree(root / "who")
    measure(tiny_model, root, folder / "data", ProfileRecipe(**SMALL | {"antithetic": True}))
    one = loaded(root, tiny_model)["deed/won"]
    assert one.provenance["measured"]["settings"]["recipe"]["antithetic"] is True
    found = load_joint(root, weights_sha256(tiny_model), {"deed/won": one})
    assert found is not None and found.names == ("deed/won",)


def test_what_cannot_be_measured_is_named(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    root, data = tmp_path / "out", folder / "data"
    shutil.copytree(folder / "made", root)
    with pytest.raises(ArtifactError, match="profile of 64 slices, but the edges go to 32"):
        measure(tiny_model, root, data, ProfileRecipe(**SMALL | {"edges": (0, 32)}))
    with pytest.raises(SteerserveError, match="no step of 12 falls into pulse-1-2"):
        measure(tiny_model, root, data, ProfileRecipe(**SMALL | {"edges": (0, 1, 2, 64)}))
    assert not (root / ".profile").exists()
    path = root / "who" / "king" / "attribute.json"
    whole = path.read_text()
    for change, message in (
        ({"profile": None}, "'who/king' has no commitment curve"),
        ({"provenance": {}}, r"'who/king' does not say what texts it is of"),
        ({"strength": 0.0}, "'who/king' has strength 0 in unit 'residual'"),
        ({"unit": "raw"}, "in unit 'raw': it must be other than 0, in unit 'residual'"),
    ):
        path.write_text(json.dumps(json.loads(whole) | change))
        with pytest.raises(ArtifactError, match=message):
            measure(tiny_model, root, data, ProfileRecipe(**SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 1}, "runs must be 2 or more, got 1"),
        ({"positions": 0}, "positions must be 1 or more, got 0"),
        ({"edges": (0, 4, 4)}, r"edges must be slices that rise from 0, got \(0, 4, 4\)"),
        ({"edges": (1, 4)}, "edges must be slices that rise from 0"),
        ({"pulse": 0.0}, "pulse must be above 0"),
    ],
)
def test_a_bad_recipe_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileRecipe(**SMALL | change)
