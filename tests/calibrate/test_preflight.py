"""What cannot be calibrated or measured is refused before the model is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from steerserve.calibrate.probes import train_probes
from steerserve.calibrate.profile.measure import measure
from steerserve.calibrate.recipes import ProbeRecipe, ProfileRecipe
from steerserve.calibrate.run import calibrate
from steerserve.cli import main
from steerserve.errors import ArtifactError, SteerserveError
from steerserve.models import OpenedModel
from steerserve.train.corpus import split_of
from tests.calibrate import made

NOT_LOADED = "a model that was not to be loaded"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """LLaDA, which writes at temperature 0 unless told otherwise, with data, SAEs and an attribute."""
    folder = tmp_path_factory.mktemp("rehearsal")
    made.make_family(folder / "model", "llada", tiny_model)
    made.make_data(folder / "data")
    made.make_saes(folder / "saes", folder / "model")
    (folder / "task.json").write_text(json.dumps(made.TASKS[2:]))
    recipe = made.make_recipe(folder, tasks=folder / "task.json", temperature=1.0)
    calibrate(folder / "model", folder / "saes", folder / "data", folder / "attributes", recipe)
    return folder


@pytest.fixture(scope="module")
def of_ratios(folder: Path, tiny_model: Path) -> Path:
    """SEDD, whose KL is not measured, with SAEs."""
    made.make_family(folder / "sedd" / "model", "sedd", tiny_model)
    made.make_saes(folder / "sedd" / "saes", folder / "sedd" / "model")
    return folder / "sedd"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models may be opened, but not loaded."""

    def load(*_: object) -> None:
        raise AssertionError(NOT_LOADED)

    monkeypatch.setattr(OpenedModel, "load", load)


def calibrated(folder: Path, out: Path, **changes: Any) -> None:
    recipe = made.make_recipe(folder, **{"tasks": folder / "task.json"} | changes)
    calibrate(folder / "model", folder / "saes", folder / "data", out, recipe)


def measured(folder: Path, root: Path, **changes: Any) -> None:
    small: dict[str, Any] = {"runs": 3, "run_tokens": 12, "run_steps": 12, "edges": (0, 64), "judge_texts": 60}
    measure(folder / "model", root, folder / "data", ProfileRecipe(**small | changes))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("changes", [{}, {"sites_kl": 0.3}, {"temperature": 0.0, "order": "margin"}], ids=str)
def test_a_sampler_that_draws_nothing_is_refused(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    order = changes.get("order", "confidence")
    said = rf"nothing is drawn with temperature 0, order '{order}' and transfer 'linear'.+--temperature above 0"
    with pytest.raises(ArtifactError, match=said):
        calibrated(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    profile = {name: value for name, value in changes.items() if name != "sites_kl"}
    with pytest.raises(ArtifactError, match=said):
        measured(folder, folder / "attributes", **profile)
    assert not (folder / "attributes" / ".profile").exists()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"order": "random"}, {"transfer": "origin"}], ids=str)
def test_one_that_draws_is_not(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=NOT_LOADED):
        calibrated(folder, tmp_path / "out", **changes)
    with pytest.raises(AssertionError, match=NOT_LOADED):
        measured(folder, folder / "attributes", **changes)


@pytest.mark.usefixtures("unloaded")
def test_a_model_of_one_candidate_draws_nothing_either(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"top_k": 1, "temperature": 0.7}')
    recipe = made.make_recipe(folder, tasks=folder / "task.json")
    with pytest.raises(
        ArtifactError, match=r"drawn with top_k 1, .+give a top_k above 1 in the model.s generation_config"
    ):
        calibrate(tmp_path / "model", folder / "saes", folder / "data", tmp_path / "out", recipe)


@pytest.mark.usefixtures("unloaded")
def test_the_command_says_what_to_give(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "--model", str(folder / "model"), "--data", str(folder / "data")]
    tasks = ["--tasks", str(folder / "task.json")]
    for more in (
        ["--sae", str(folder / "saes"), "--out", str(tmp_path / "out"), *tasks],
        ["--profile", str(folder / "attributes")],
    ):
        assert main([*command, *more]) == 2
        assert "give --temperature above 0" in capsys.readouterr().err
        with pytest.raises(AssertionError, match=NOT_LOADED):
            main([*command, *more, "--temperature", "0.8"])


def test_texts_that_are_all_the_same_are_refused_though_something_was_drawn(folder: Path, tmp_path: Path) -> None:
    # In a single step every order comes to the same.
    cold: dict[str, Any] = {"temperature": 0.0, "order": "random"}
    with pytest.raises(ArtifactError, match="all 5 unsteered samples are the same text: give a higher --temperature"):
        calibrated(folder, tmp_path / "out", **cold, sample_steps=1)
    with pytest.raises(ArtifactError, match="all 2 unsteered trials are the same text"):
        calibrated(folder, tmp_path / "out", **cold, trial_steps=1)
    root = tmp_path / "attributes"
    shutil.copytree(folder / "attributes", root)
    with pytest.raises(ArtifactError, match="all 3 unsteered runs are the same text"):
        measured(folder, root, **cold, run_steps=1)
    # And what was not kept is in nobody's way.
    assert not (root / ".profile").exists()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_tokens": 65}, r"--sample-tokens: .*at most 64 are taken: max_tokens may be 64"),
        ({"sample_steps": 1 << 21}, "--sample-steps: steps must be a whole number from 1 to 1048576, got 2097152"),
        ({"trial_tokens": 65}, "--trial-tokens: .*at most 64 are taken: max_tokens may be 64"),
        ({"trial_steps": 1 << 21}, "--trial-steps: steps must be a whole number"),
        ({"temperature": 11.0}, "--temperature: temperature must be 0 to 2, got 11.0"),
        ({"temperature": float("nan")}, "--temperature: temperature must be 0 to 2, got nan"),
        ({"order": "best"}, "--order: unknown order 'best'; known: confidence"),
        ({"order": "sae_attribute"}, "--order: order 'sae_attribute' needs an attribute to read"),
        ({"transfer": "most"}, "--transfer: unknown transfer 'most'; known: analytic"),
        ({"transfer": "analytic"}, r"--transfer: this transfer needs a model that predicts ratios \(SEDD\)"),
        ({"transfer": {"type": "threshold", "value": 2}}, "--transfer: .+value"),
        (
            {"schedule": "optimal"},
            "--schedule: schedule 'optimal' needs measured sensitivity and cost.+allowed are com",
        ),
        (
            {"schedule": "joint"},
            "--schedule: unknown schedule 'joint'.+allowed are commitment, feedback, piecewise, un",
        ),
        ({"schedule": {"type": "commitment", "norm": "kl"}}, "--schedule: norm 'kl' needs .+ cost.+ l2, mean, peak"),
        ({"schedule": {"type": "feedback", "rate": 2}}, "--schedule: closed-loop schedule 'feedback': rate must be"),
        ({"schedule": {"type": "window", "start": 0.5}}, "--schedule: schedule 'window' needs stop"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_their_option(
    folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArtifactError, match=f"^{said}"):
        calibrated(folder, tmp_path / "out", **{"temperature": 1.0} | changes)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    "schedule",
    ["commitment", "uniform", "feedback", {"type": "window", "start": 0.2, "stop": 0.5, "norm": "l2"}],
    ids=str,
)
def test_schedules_that_need_no_more_than_a_curve_are_allowed(folder: Path, tmp_path: Path, schedule: Any) -> None:
    with pytest.raises(AssertionError, match=NOT_LOADED):
        calibrated(folder, tmp_path / "out", temperature=1.0, schedule=schedule, sites_kl=0.3)


@pytest.mark.usefixtures("unloaded")
def test_a_measured_kl_is_refused_for_a_model_that_has_none(folder: Path, of_ratios: Path, tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        recipe = made.make_recipe(folder, tasks=folder / "task.json", **changes)
        calibrate(of_ratios / "model", of_ratios / "saes", folder / "data", tmp_path / "out", recipe)

    with pytest.raises(AssertionError, match=NOT_LOADED):
        run()
    with pytest.raises(
        ArtifactError, match="^--sites-kl: measure_kl is measured, for models that predict tokens; sedd predicts"
    ):
        run(sites_kl=0.3)
    with pytest.raises(ArtifactError, match="^--transfer: the sedd family predicts the rate .+ analytic and euler"):
        run(transfer="linear")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_tokens": 65}, "--run-tokens: .*at most 64 are taken: max_tokens may be 64"),
        ({"run_steps": 1 << 21}, "--run-steps: steps must be a whole number"),
        ({"temperature": -1.0}, "--temperature: temperature must be 0 to 2, got -1.0"),
        ({"order": "sae_stability"}, "--order: order 'sae_stability' needs an SAE"),
        ({"transfer": "euler"}, "--transfer: this transfer needs a model that predicts ratios"),
        ({"edges": (0, 1, 2, 64)}, "no step of 12 falls into pulse-1-2"),
    ],
    ids=str,
)
def test_a_measurement_that_cannot_be_is_refused_by_its_option(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SteerserveError, match=f"^{said}"):
        measured(folder, folder / "attributes", **{"temperature": 1.0} | changes)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_not_all_can_be_drawn_from_is_refused(folder: Path, seed: int) -> None:
    said = f"seed must be 0 to 4294967295, got {seed}"
    with pytest.raises(ValueError, match=said):
        made.make_recipe(folder, seed=seed)
    with pytest.raises(ValueError, match=said):
        ProfileRecipe(seed=seed)
    with pytest.raises(ValueError, match=said):
        ProbeRecipe(seed=seed)


@pytest.mark.usefixtures("unloaded")
def test_texts_that_are_not_there_are_missed_before_anything_is_computed(folder: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps([made.TASKS[2] | {"contrast": "drew"}]))
    hot: dict[str, Any] = {"temperature": 1.0}
    with pytest.raises(ArtifactError, match=r"no text to use has deed \['drew'\]"):
        calibrated(folder, tmp_path / "out", **hot, tasks=tasks)
    few = r"\('who',\): too few texts to train on and to measure by: \['\w+'"
    with pytest.raises(ArtifactError, match=few):
        calibrated(folder, tmp_path / "out", **hot, judge_texts=1)
    recipe = made.make_recipe(folder, tasks=folder / "task.json", **hot)
    folders = folder / "model", folder / "saes", folder / "data", tmp_path / "out"
    with pytest.raises(ArtifactError, match=few):
        calibrate(*folders, recipe, probe_recipe=ProbeRecipe(probe_texts=1))
    with pytest.raises(ArtifactError, match=few):
        measured(folder, folder / "attributes", **hot, judge_texts=1)
    assert not (folder / "attributes" / ".profile").exists()
    with pytest.raises(ArtifactError, match=few):
        train_probes(folder / "model", folder / "attributes", folder / "data", ProbeRecipe(probe_texts=1))
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.loads(line) for line in (folder / "data" / "who.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) for row in rows if split_of(row["text"]) != "valid"]
    (data / "who.jsonl").write_text("\n".join(kept))
    split = tmp_path / "split.json"
    split.write_text(json.dumps([one | {"all_texts": False} for one in json.loads((folder / "task.json").read_text())]))
    recipe = made.make_recipe(folder, tasks=split, **hot)
    with pytest.raises(ArtifactError, match="no text falls into the held-out split"):
        calibrate(folder / "model", folder / "saes", data, tmp_path / "out", recipe)
