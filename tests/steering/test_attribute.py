"""Attributes on disk: what is saved is what is loaded, and nothing else is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import ArtifactError
from steerserve.steering.attribute import Attribute, load_attribute, load_attributes
from tests import tiny


def load(folder: Path) -> Attribute:
    return load_attribute(folder, tiny.MODEL_SHA, num_layers=3, hidden_size=tiny.HIDDEN)


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    first = tiny.attribute(tmp_path / "a", "topic/sports", (0, 2), cost=True)
    first.save(tmp_path / "b")
    second = load(tmp_path / "b")
    assert second.card() == first.card()
    assert second.sites == first.sites
    assert second.profile == first.profile
    assert set(second.directions) == {(0, "sae"), (0, "diff_means"), (2, "sae"), (2, "diff_means")}
    for place, direction in first.directions.items():
        torch.testing.assert_close(second.directions[place], direction)
        assert float(direction.norm()) == pytest.approx(1)
    assert len(first.sha256) == 64


def test_the_hash_is_of_the_card_and_the_directions(tmp_path: Path) -> None:
    base = tiny.attribute(tmp_path / "a", "x")
    assert load(tmp_path / "a").sha256 == base.sha256
    assert tiny.attribute(tmp_path / "b", "x", strength=0.5).sha256 != base.sha256
    assert tiny.attribute(tmp_path / "c", "x", seed=1).sha256 != base.sha256


def test_directions_are_normalised(tmp_path: Path) -> None:
    long = {(1, "sae"): 7 * torch.ones(tiny.HIDDEN)}
    loaded = tiny.attribute(tmp_path, "x", directions=long)
    assert float(loaded.directions[1, "sae"].norm()) == pytest.approx(1)


def test_an_attribute_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny.attribute(tmp_path, "topic/sports")
    with pytest.raises(
        ArtifactError, match="'topic/sports' was calibrated for the model 5eed5eed5eed, this one is 0000"
    ):
        load_attribute(tmp_path, "0" * 64, num_layers=3, hidden_size=tiny.HIDDEN)


@pytest.mark.parametrize(("layers", "hidden"), [(1, tiny.HIDDEN), (3, tiny.HIDDEN + 1)])
def test_a_direction_that_does_not_fit_is_refused(tmp_path: Path, layers: int, hidden: int) -> None:
    tiny.attribute(tmp_path, "x")
    with pytest.raises(ArtifactError, match="does not fit a model of"):
        load_attribute(tmp_path, tiny.MODEL_SHA, num_layers=layers, hidden_size=hidden)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_direction_without_a_direction_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ArtifactError, match="does not fit"):
        tiny.attribute(tmp_path, "x", directions={(1, "sae"): torch.full((tiny.HIDDEN,), value)})


@pytest.mark.parametrize("name", ["-1.sae", "sae", "one.sae", ".sae"])
def test_a_direction_of_no_layer_is_refused(tmp_path: Path, name: str) -> None:
    tiny.attribute(tmp_path, "x")
    path = tmp_path / "directions.safetensors"
    save_file(load_file(path) | {name: torch.ones(tiny.HIDDEN)}, path)
    with pytest.raises(ArtifactError):
        load(tmp_path)


def test_directions_that_were_changed_are_refused(tmp_path: Path) -> None:
    tiny.attribute(tmp_path, "x")
    path = tmp_path / "directions.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="not the file the attribute was saved with"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["attribute.json", "directions.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, file: str, share: float) -> None:
    tiny.attribute(tmp_path, "x")
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ArtifactError, match="is no attribute"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["attribute.json", "directions.safetensors"])
def test_a_missing_file_is_refused(tmp_path: Path, file: str) -> None:
    tiny.attribute(tmp_path, "x")
    (tmp_path / file).unlink()
    with pytest.raises(ArtifactError, match="is no attribute"):
        load(tmp_path)


def _feature(index: object) -> dict[str, object]:
    return {"index": index, "d": 0.5, "p_value": 0.1, "weight": 1.0}


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a site beyond the model": lambda raw: raw | {"sites": raw["sites"] | {"3": raw["sites"]["1"]}},
    "a site without an SAE's hash": lambda raw: raw | {"sites": {"1": raw["sites"]["1"] | {"sae_sha256": None}}},
    "a feature of text": lambda raw: raw | {"sites": {"1": raw["sites"]["1"] | {"features": [_feature("3")]}}},
    "a feature below 0": lambda raw: raw | {"sites": {"1": raw["sites"]["1"] | {"features": [_feature(-1)]}}},
    "a layer that is no whole number": lambda raw: raw | {"layers": [1.0]},
    "another format": lambda raw: raw | {"format": 99},
    "no sites": lambda raw: {key: value for key, value in raw.items() if key != "sites"},
    "no hash of the directions": lambda raw: {key: value for key, value in raw.items() if key != "directions_sha256"},
    "sites as a list": lambda raw: raw | {"sites": []},
    "a list": lambda raw: [raw],
    "a layer without a site": lambda raw: raw | {"layers": [0, 1]},
    "no layers": lambda raw: raw | {"layers": []},
    "layers as a number": lambda raw: raw | {"layers": 1},
    "a site of no layer": lambda raw: raw | {"sites": {"x": raw["sites"]["1"]}},
    "a residual norm of zero": lambda raw: raw | {"sites": {"1": raw["sites"]["1"] | {"residual_norm": 0.0}}},
    "a residual norm of text": lambda raw: raw | {"sites": {"1": raw["sites"]["1"] | {"residual_norm": "5"}}},
    "a feature with more": lambda raw: raw | {"sites": {"1": raw["sites"]["1"] | {"features": [{"index": 1, "z": 2}]}}},
    "a strength that is none": lambda raw: raw | {"strength": float("nan")},
    "a unit of no name": lambda raw: raw | {"unit": "watts"},
    "a scope of no name": lambda raw: raw | {"scope": "here"},
    "a scope that is a span": lambda raw: raw | {"scope": [1, 2]},
    "directions without a site": lambda raw: raw | {"sites": {"2": raw["sites"]["1"]}},
    "a strength of text": lambda raw: raw | {"strength": "0.4"},
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_card_that_does_not_hold_together_is_refused(tmp_path: Path, change: str) -> None:
    tiny.attribute(tmp_path, "x")
    path = tmp_path / "attribute.json"
    path.write_text(json.dumps(CHANGES[change](json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(ArtifactError):
        load(tmp_path)


def test_a_folder_of_attributes_is_read_by_name(tmp_path: Path) -> None:
    tiny.attribute(tmp_path / "topic" / "sports", "topic/sports")
    tiny.attribute(tmp_path / "register", "register/archaic", seed=1)
    found = load_attributes(tmp_path, tiny.MODEL_SHA, 3, tiny.HIDDEN)
    assert set(found) == {"topic/sports", "register/archaic"}
    assert all(name == one.name for name, one in found.items())


def test_two_attributes_of_one_name_are_refused(tmp_path: Path) -> None:
    tiny.attribute(tmp_path / "a", "x")
    tiny.attribute(tmp_path / "b", "x")
    with pytest.raises(ArtifactError, match="a second attribute named 'x'"):
        load_attributes(tmp_path, tiny.MODEL_SHA, 3, tiny.HIDDEN)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load_attributes(tmp_path / "none", tiny.MODEL_SHA, 3, tiny.HIDDEN)
