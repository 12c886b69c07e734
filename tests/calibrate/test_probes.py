"""Probes trained on a tiny model's states of made-up texts."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from steerserve.calibrate import probes as module
from steerserve.calibrate.probes import (
    INVERSE_PENALTY,
    balanced_accuracy,
    fit,
    probe_texts,
    probes_of,
    train_probes,
)
from steerserve.calibrate.provenance import write_profile
from steerserve.calibrate.recipes import ProbeRecipe, ProfileRecipe
from steerserve.calibrate.run import calibrate
from steerserve.calibrate.texts.labelled import labelled_texts
from steerserve.calibrate.texts.tasks import Task
from steerserve.cli import main
from steerserve.errors import ArtifactError
from steerserve.models import load_model, load_tokenizer, weights_sha256
from steerserve.models.means import mean_states
from steerserve.steering.attribute import Attribute, load_attributes
from steerserve.steering.probe import FILE, Probe
from steerserve.train.classifiers import held_out_sets
from tests.calibrate.made import TASKS, make_data, make_recipe, make_saes

NAMES = sorted(task["name"] for task in TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    make_data(folder / "data")
    make_saes(folder / "saes", tiny_model)
    calibrate(tiny_model, folder / "saes", folder / "data", folder / "out", make_recipe(folder))
    return folder


def loaded(root: Path, model: Path) -> dict[str, Attribute]:
    return load_attributes(root, weights_sha256(model), 2, 32)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def states_and_classes() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Two overlapping clouds of unequal size, in numbers of very unequal spread, one of them always the same."""
    random = np.random.default_rng(0)
    has = random.random(500) < 0.25
    states = random.normal(size=(500, 12)) + 0.8 * has[:, None] * (np.arange(12) % 3 == 0)
    states = states * np.logspace(-2, 2, 12) + np.linspace(-5, 5, 12)
    states[:, 5] = 7.0
    return states.astype(np.float32), has


def test_weights_say_what_the_standardised_regression_says() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    states, has = states_and_classes()
    weights, bias = fit(states, has)
    peer = make_pipeline(
        StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000)
    )
    peer.fit(states.astype(np.float64), has)
    probability = Probe(0, torch.from_numpy(weights), bias, 0.0, 0).log_odds(torch.from_numpy(states)).sigmoid()
    np.testing.assert_allclose(probability, peer.predict_proba(states.astype(np.float64))[:, 1], atol=2e-5)
    assert weights[5] == 0


def test_classes_count_the_same_whatever_their_size() -> None:
    has = np.array([True] * 2 + [False] * 8)
    assert balanced_accuracy(np.zeros(10, dtype=bool), has) == 0.5
    assert balanced_accuracy(np.array([True, False] + [False] * 6 + [True] * 2), has) == pytest.approx(0.625)
    states, has = states_and_classes()
    weights, bias = fit(states, has)
    says = states @ weights + bias > 0
    # A fit of the shares would call most of them the larger class.
    assert abs(says[has].mean() - (~says[~has]).mean()) < 0.1


def test_a_calibration_gives_every_attribute_a_probe_of_the_last_layer(folder: Path, tiny_model: Path) -> None:
    found = loaded(folder / "out", tiny_model)
    assert sorted(found) == NAMES
    for one in found.values():
        assert one.probe is not None and one.probe.layer == 1
        assert one.probe.accuracy > 0.75


def test_accuracy_is_of_texts_held_out_in_turn_and_all_are_trained_on(folder: Path, tiny_model: Path) -> None:
    one = loaded(folder / "out", tiny_model)["who/king"]
    assert one.probe is not None
    group = Task.from_json(one.provenance["task"], "task").group
    texts = labelled_texts(folder / "data", group, "calibrate", 8000, 0)
    every = [(label, text) for label in texts for text in texts[label]]
    assert one.probe.texts == len(every)
    tokenizer, model = load_tokenizer(tiny_model), load_model(tiny_model)

    def states(some: list[tuple[str, str]]) -> Any:
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for _, text in some]
        return mean_states(model, ids, [1])[1].numpy()

    right: dict[bool, list[bool]] = {True: [], False: []}
    for held_out in held_out_sets(texts):
        rest = [pair for pair in every if pair[1] not in held_out]
        weights, bias = fit(states(rest), np.array([label == "king" for label, _ in rest]))
        away = [pair for pair in every if pair[1] in held_out]
        for said, (label, _) in zip(states(away) @ weights + bias > 0, away, strict=True):
            right[label == "king"].append(bool(said) == (label == "king"))
    expected = sum(sum(several) / len(several) for several in right.values()) / 2
    assert one.probe.accuracy == pytest.approx(expected, abs=1e-3)


def test_training_anew_makes_the_same_bytes_and_changes_nothing_else(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    for path in (tmp_path / "out").rglob(FILE):
        path.unlink()
    command = ["calibrate", "--model", str(tiny_model), "--data", str(folder / "data")]
    assert main([*command, "--probes", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert files(tmp_path / "out") == files(folder / "out")
    said = capsys.readouterr().err
    for name, one in loaded(tmp_path / "out", tiny_model).items():
        assert one.probe is not None
        assert f"{name}: right on {one.probe.accuracy:.1%} of " in said
        assert f"trained on {one.probe.texts}" in said


def test_texts_of_a_group_are_read_once(folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    states = module._states

    def noted(model: Any, tokenizer: Any, pieces: list[str], layer: int, title: str) -> Any:
        read.append(title)
        return states(model, tokenizer, pieces, layer, title)

    monkeypatch.setattr(module, "_states", noted)
    tasks = {str(raw["name"]): Task.from_json(raw, "task") for raw in TASKS}
    texts = probe_texts(folder / "data", tasks.values(), ProbeRecipe(probe_texts=40))
    found = probes_of(load_model(tiny_model), load_tokenizer(tiny_model), texts, tasks)
    assert list(found) == [task["name"] for task in TASKS] and len(read) == len(set(read)) == 2
    assert all(probe.texts <= 3 * 40 for probe in found.values())


def test_special_tokens_in_texts_are_spelled_out(tiny_model: Path, tmp_path: Path) -> None:
    """As they are when a finished text is judged: what somebody wrote is no mask and no end of the text."""
    tokenizer = load_tokenizer(tiny_model)
    seen: list[list[int]] = []

    def noted(model: Any, ids: list[list[int]], layers: list[int]) -> Any:
        seen.extend(ids)
        return mean_states(model, ids, layers)

    data = make_data(tmp_path / "data")
    path = data / "who.jsonl"
    path.write_text(path.read_text().replace("nobody saw it", "nobody [MASK] [SEP] it"))
    tasks = {str(raw["name"]): Task.from_json(raw, "task") for raw in TASKS[:1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "mean_states", noted)
        texts = probe_texts(data, tasks.values(), ProbeRecipe(probe_texts=40))
        probes_of(load_model(tiny_model), tokenizer, texts, tasks)
    special = {tokenizer.token_to_id(token) for token in ("[MASK]", "[SEP]")}
    assert seen and not any(special & {*ids} for ids in seen)
    assert tokenizer.encode("[MASK]", add_special_tokens=False).ids == [tokenizer.token_to_id("[MASK]")]


def test_a_profile_measured_anew_keeps_the_probe(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(folder / "out", root)
    shutil.rmtree(root / "who")
    before = loaded(root, tiny_model)["deed/won"]
    from steerserve.calibrate.profile.measure import measure

    recipe = ProfileRecipe(
        runs=2, run_tokens=12, run_steps=12, edges=(0, 20, 64), canvases=2, positions=2, pulse=20.0, judge_texts=60
    )
    measure(tiny_model, root, folder / "data", recipe)
    after = loaded(root, tiny_model)["deed/won"]
    assert after.sha256 != before.sha256
    assert before.probe is not None and after.probe is not None and after.probe.sha256 == before.probe.sha256


def test_an_attribute_that_is_gone_is_named(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    from schedulers import CommitmentProfile

    profile = loaded(folder / "out", tiny_model)["deed/won"].profile
    with pytest.raises(ArtifactError, match="the attribute 'deed/won' is gone"):
        write_profile(tmp_path, "deed/won", CommitmentProfile.from_json(profile or {}), {})


def test_what_cannot_be_trained_is_named(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no attribute"):
        train_probes(tiny_model, folder / "data", folder / "data")
    with pytest.raises(ArtifactError, match=r"\('who',\): too few texts to train on and to measure by"):
        train_probes(tiny_model, folder / "out" / "deed", folder / "data", ProbeRecipe(probe_texts=1))
    root = tmp_path / "out"
    shutil.copytree(folder / "out", root)
    path = root / "who" / "king" / "attribute.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": {}}))
    with pytest.raises(ArtifactError, match="'who/king' does not say what texts it is of"):
        train_probes(tiny_model, root, folder / "data")
    with pytest.raises(ValueError, match="probe_texts must be 1 or more, got 0"):
        ProbeRecipe(probe_texts=0)
