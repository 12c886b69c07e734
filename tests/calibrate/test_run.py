"""A whole calibration of a tiny model, from texts to attributes that load and steer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from schedulers import CommitmentProfile
from steerserve.calibrate import run as module
from steerserve.calibrate.recipes import ProbeRecipe
from steerserve.calibrate.run import calibrate, masked_saes
from steerserve.calibrate.texts.tasks import Task
from steerserve.calibrate.trials.attribute import choose_and_save
from steerserve.cli import main
from steerserve.config import EngineConfig, ModelConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError
from steerserve.models import load_model, load_tokenizer, weights_sha256
from steerserve.steering.attribute import Attribute, load_attributes
from tests import tiny
from tests.calibrate.made import SMALL, TASKS, make_data, make_recipe, make_saes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    make_data(folder / "data")
    make_saes(folder / "saes", tiny_model)
    calibrate(tiny_model, folder / "saes", folder / "data", folder / "out", make_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def attributes(folder: Path, tiny_model: Path) -> dict[str, Attribute]:
    return load_attributes(folder / "out", weights_sha256(tiny_model), 2, 32)


def test_every_task_becomes_an_attribute_that_loads(attributes: dict[str, Attribute], folder: Path) -> None:
    assert sorted(attributes) == sorted(task["name"] for task in TASKS)
    assert not (folder / "out" / ".cache").exists()
    for one in attributes.values():
        assert (one.unit, one.scope, one.schedule) == ("residual", "masked", {"type": "commitment"})
        assert sorted(one.sites) == [0, 1] and set(one.layers) <= {0, 1}
        assert sorted(one.directions) == [(0, "diff_means"), (0, "sae"), (1, "diff_means"), (1, "sae")]
        assert one.profile is not None and CommitmentProfile.from_json(one.profile).slices == 64
        for site in one.sites.values():
            steering = [feature for feature in site.features if feature.weight > 0]
            assert 0 < len(steering) <= 4 and all(feature.d > 0 for feature in steering)


def test_provenance_says_where_everything_came_from(attributes: dict[str, Attribute], folder: Path) -> None:
    one = attributes["deed/won"].provenance
    assert Task.from_json(one["task"], "task").confidence == 0.6
    assert set(one["files"]) == {"who"} and len(one["files"]["who"]) == 64
    assert one["recipe"]["texts"] == SMALL["texts"] and "tasks" not in one["recipe"]
    assert one["classifier"]["accuracy"] > 0.5 and one["samples"]["written"] == 5
    assert set(one["saes"]) == {"0", "1"}
    ablation = one["ablation"]
    # Two rounds settle three strengths, for each layer and for both.
    assert len(ablation["searched"]) == 6 and len(ablation["confirmed"]) == 3
    assert {tuple(trial["layers"]) for trial in ablation["searched"]} == {(0,), (1,), (0, 1)}
    chosen = [attributes["deed/won"].strength, list(attributes["deed/won"].layers)]
    assert chosen in [[trial["strength"], trial["layers"]] for trial in ablation["confirmed"]]
    assert str(folder) not in json.dumps(one)


def test_layers_are_chosen_at_one_measured_kl_where_it_is_asked_for(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "one.json"
    tasks.write_text(json.dumps(TASKS[2:]))
    recipe = make_recipe(folder, tasks=tasks, sites_kl=1e-3)
    made = calibrate(tiny_model, folder / "saes", folder / "data", tmp_path / "out", recipe)["deed/won"]
    ablation = made.provenance["ablation"]
    sites = ablation["sites"]
    assert [row["layers"] for row in sites["reached"]] == [[0], [1], [0, 1]] and sites["kl"] == 1e-3
    assert all(row["kl"] > 0 and row["texts"] == 3 for row in sites["reached"])
    # Strengths differ, since layers cost differently; the strength is then searched for the chosen layers alone.
    assert len({row["strength"] for row in sites["reached"]}) == 3
    assert made.layers == tuple(sites["chosen"])
    assert {tuple(trial["layers"]) for trial in ablation["searched"]} == {made.layers}
    assert made.provenance["recipe"]["sites_kl"] == 1e-3
    said = capsys.readouterr().err
    assert "deed/won: layers at 0.001 measured nats a response token" in said
    # Two rows, three sets, three rounds of two texts and three fresh ones, four steps.
    assert "216 forward passes of one row to choose among 3 layer sets" in said


def test_a_person_is_told_what_was_found_and_how_sure_it_is(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "one.json"
    tasks.write_text(json.dumps(TASKS[2:]))
    flags = {name: value for name, value in make_recipe(folder).to_json().items() if name in SMALL}
    given = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in flags.items()
        if name not in ("search_texts", "confirm_texts")
    ]
    folders = ["--model", str(tiny_model), "--sae", str(folder / "saes"), "--out", str(tmp_path / "out")]
    command = ["calibrate", *folders, "--data", str(folder / "data"), "--tasks", str(tasks), "--quick", *given]
    assert main([*command, "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "who, field 'deed': 60 'lost', 60 'won' (features are found on 20 of each)" in said
    assert "a classifier of words is right on" in said and "always saying the commonest label is right on 50%" in said
    assert "deed/won: layers" in said and "of 16 steered texts have it" in said
    assert f"steerserve serve {' '.join(folders[:4])} --attributes {tmp_path / 'out'}" in said
    assert "--attribute deed/won" in said


def test_the_attributes_steer(attributes: dict[str, Attribute], tiny_model: Path) -> None:
    model = load_model(tiny_model)
    norms = {layer: site.residual_norm for one in attributes.values() for layer, site in one.sites.items()}
    catalogue = Catalogue(model.facts, attributes, {}, norms)
    engine = DiffusionEngine(model, load_tokenizer(tiny_model), catalogue, EngineConfig())
    push = Intervention(attribute="who/king", strength=3.0)
    # Log-probabilities and not tokens: the model's weights are so small that a draw may survive a push.
    plain, steered = (
        tiny.run(engine, GenerationParams(max_tokens=12, ignore_eos=True, logprobs=True, interventions=pushes))[0][1]
        for pushes in ((), (push,))
    )
    assert plain.logprobs != steered.logprobs
    assert steered.receipt is not None
    assert steered.receipt["interventions"][0]["applied"] is True


def test_what_is_there_is_kept_and_what_is_missing_made_again(
    folder: Path, attributes: dict[str, Attribute], tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    kept = (out / "deed" / "won" / "attribute.json").stat().st_mtime_ns
    shutil.rmtree(out / "who" / "crew")
    (out / "who" / "king" / "attribute.json").write_text('{"cut sho')
    recipe = make_recipe(folder)
    assert sorted(calibrate(tiny_model, folder / "saes", folder / "data", out, recipe)) == ["who/crew", "who/king"]
    assert (out / "deed" / "won" / "attribute.json").stat().st_mtime_ns == kept
    again = load_attributes(out, weights_sha256(tiny_model), 2, 32)
    for name, one in attributes.items():
        assert (again[name].layers, again[name].strength) == (one.layers, one.strength)
        for layer, site in one.sites.items():
            assert [f.index for f in again[name].sites[layer].features] == [f.index for f in site.features]
        for key, direction in one.directions.items():
            torch.testing.assert_close(again[name].directions[key], direction, rtol=1e-4, atol=1e-5)
    assert calibrate(tiny_model, folder / "saes", folder / "data", out, recipe) == {}


def test_an_attribute_of_another_recipe_is_not_overwritten(folder: Path, tiny_model: Path) -> None:
    with pytest.raises(ArtifactError, match="was made with another recipe and probes: remove it"):
        calibrate(tiny_model, folder / "saes", folder / "data", folder / "out", make_recipe(folder, seed=5))


def test_only_saes_for_masked_positions_are_used(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    facts, digest, recipe = load_model(tiny_model).facts, weights_sha256(tiny_model), make_recipe(tmp_path)
    found = masked_saes(folder / "saes", facts, digest, recipe)
    assert {layer: sae.facts.policy for layer, sae in found.items()} == {0: "mask", 1: "mask"}
    assert list(masked_saes(folder / "saes", facts, digest, make_recipe(tmp_path, layers=(1,)))) == [1]
    with pytest.raises(ArtifactError, match=r"no SAE of layers \[5\]"):
        masked_saes(folder / "saes", facts, digest, make_recipe(tmp_path, layers=(5,)))
    with pytest.raises(ArtifactError, match="no SAE of k 9"):
        masked_saes(folder / "saes", facts, digest, make_recipe(tmp_path, sae_k=9))
    with pytest.raises(ArtifactError, match="trained on the model .* but the model loaded is 00"):
        masked_saes(folder / "saes", facts, "00", recipe)
    shutil.copytree(folder / "saes" / "layer-1-mask", tmp_path / "two" / "a")
    shutil.copytree(folder / "saes" / "layer-1-mask", tmp_path / "two" / "b")
    with pytest.raises(ArtifactError, match="b and a are both for masked positions"):
        masked_saes(tmp_path / "two", facts, digest, recipe)
    shutil.copytree(folder / "saes" / "layer-1-visible", tmp_path / "none" / "a")
    with pytest.raises(ArtifactError, match="no SAE for masked positions"):
        masked_saes(tmp_path / "none", facts, digest, recipe)


def stop(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_run_stopped_before_its_first_attribute_may_be_begun_again_by_another_recipe(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "one.json"
    tasks.write_text(json.dumps(TASKS[2:]))
    for out, stages in (("out", ("_contrast", "feature_curves", "probes_of", "choose_and_save")), ("fresh", ())):
        for i, stage in enumerate(stages):
            other = make_recipe(folder, tasks=tasks, temperature=1.0 + i / 4, texts=12 + i, slices=32)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(module, stage, stop)
                calibrate(tiny_model, folder / "saes", folder / "data", tmp_path / out, other)
            assert [path.name for path in (tmp_path / out).rglob("*") if path.is_file()] == ["samples.json"]
        recipe = make_recipe(folder, tasks=tasks)
        calibrate(tiny_model, folder / "saes", folder / "data", tmp_path / out, recipe)
    files = [
        {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in (tmp_path / out).rglob("*.*")}
        for out in ("out", "fresh")
    ]
    assert files[0] == files[1] and len(files[0]) == 3


def test_a_run_stopped_between_two_attributes_goes_on_under_the_same_options_only(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", make_recipe(folder)
    done: list[str] = []

    def first_only(runner: Any, inputs: Any, *rest: Any) -> Attribute:
        if done:
            raise KeyboardInterrupt
        done.append(inputs.task.name)
        return choose_and_save(runner, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "choose_and_save", first_only)
        calibrate(tiny_model, folder / "saes", folder / "data", out, recipe)
    other = tmp_path / "tokenizer"
    other.mkdir()
    raw = json.loads((tiny_model / "tokenizer.json").read_text())
    pieces = raw["model"]["vocab"]
    pieces["won"], pieces["lost"] = pieces["lost"], pieces["won"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    for said, placed, trained in (
        ("probes", None, ProbeRecipe(probe_texts=100)),
        ("dtype", ModelConfig(dtype="bfloat16"), None),
        ("tokenizer", ModelConfig(tokenizer=other), None),
    ):
        with pytest.raises(ArtifactError, match=f"{done[0]} was made with another {said}: remove it"):
            calibrate(tiny_model, folder / "saes", folder / "data", out, recipe, placed, trained)
    made = calibrate(tiny_model, folder / "saes", folder / "data", out, recipe)
    assert sorted([*made, *done]) == sorted(task["name"] for task in TASKS)
    assert {one.provenance["probes"]["probe_texts"] for one in made.values()} == {ProbeRecipe().probe_texts}


def test_what_earlier_versions_did_not_record_is_not_held_against_an_attribute(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    for path in (tmp_path / "out").rglob("attribute.json"):
        card = json.loads(path.read_text())
        for name in ("dtype", "probes", "tokenizer"):
            del card["provenance"][name]
        path.write_text(json.dumps(card))
    assert calibrate(tiny_model, folder / "saes", folder / "data", tmp_path / "out", make_recipe(folder)) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": (0.3, 0.1)}, r"strengths must be positive and rise, got \(0.3, 0.1\)"),
        ({"mask_ratios": (0.0,)}, "mask_ratios must be shares"),
        ({"steering": 60}, "steering must be at most kept"),
        ({"texts": 0}, "texts must be 1 or more, got 0"),
        ({"sites_kl": 0.0}, "sites_kl must be a number of nats above 0, got 0.0"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"weights": "all"}, "weights must be 'equal', 'd' or 'diff_means', got 'all'"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(tmp_path, **({"kept": 50} | change))


def test_another_models_attribute_is_named_before_anything_is_computed(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    path = tmp_path / "out" / "deed" / "won" / "attribute.json"
    card = json.loads(path.read_text())
    card["provenance"]["model_sha256"] = "aa"
    path.write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match="won was made with another model_sha256"):
        calibrate(tiny_model, folder / "saes", folder / "data", tmp_path / "out", make_recipe(folder))


def test_torch_state_is_left_alone(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    tasks = tmp_path / "one.json"
    tasks.write_text(json.dumps(TASKS[2:]))
    calibrate(tiny_model, folder / "saes", folder / "data", tmp_path / "out", make_recipe(folder, tasks=tasks))
    assert torch.equal(torch.rand(1), expected)
