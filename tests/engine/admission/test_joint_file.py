"""The joint profile of a folder of attributes: kept with what it was measured on, refused for anything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schedulers import JointProfile
from steerserve.engine.admission.joint_file import load_joint, save_joint
from steerserve.errors import ArtifactError
from steerserve.steering.attribute import Attribute, load_attributes
from tests import tiny

NAMES = ("topic/sports", "register/archaic")
PROFILE = JointProfile(NAMES, ((0.5, 0.25), (1.0, -0.5)), (((2.0, 0.5), (0.5, 1.0)), ((1.0, 0.0), (0.0, 1.0))))


def made(root: Path) -> dict[str, Attribute]:
    for seed, name in enumerate(NAMES):
        tiny.attribute(root / name, name, seed=seed)
    return loaded(root)


def loaded(root: Path) -> dict[str, Attribute]:
    return load_attributes(root, tiny.MODEL_SHA, num_layers=3, hidden_size=tiny.HIDDEN)


def test_a_round_trip_keeps_the_profile(tmp_path: Path) -> None:
    attributes = made(tmp_path)
    assert load_joint(tmp_path, tiny.MODEL_SHA, attributes) is None
    save_joint(tmp_path, tiny.MODEL_SHA, attributes, PROFILE)
    assert load_joint(tmp_path, tiny.MODEL_SHA, attributes) == PROFILE
    assert [path.name for path in tmp_path.glob("joint*")] == ["joint.json"]


def test_a_new_profile_of_an_attribute_leaves_it_valid(tmp_path: Path) -> None:
    save_joint(tmp_path, tiny.MODEL_SHA, made(tmp_path), PROFILE)
    tiny.attribute(tmp_path / NAMES[0], NAMES[0], seed=0, cost=True, strength=0.7)
    assert load_joint(tmp_path, tiny.MODEL_SHA, loaded(tmp_path)) == PROFILE


def test_an_attribute_that_is_new_leaves_it_valid(tmp_path: Path) -> None:
    save_joint(tmp_path, tiny.MODEL_SHA, made(tmp_path), PROFILE)
    tiny.attribute(tmp_path / "third", "third", seed=3)
    assert load_joint(tmp_path, tiny.MODEL_SHA, loaded(tmp_path)) == PROFILE


def test_other_directions_are_refused(tmp_path: Path) -> None:
    save_joint(tmp_path, tiny.MODEL_SHA, made(tmp_path), PROFILE)
    tiny.attribute(tmp_path / NAMES[0], NAMES[0], seed=9)
    with pytest.raises(ArtifactError, match=r"directions of 'topic/sports' have changed since; calibrate again"):
        load_joint(tmp_path, tiny.MODEL_SHA, loaded(tmp_path))


def test_an_attribute_that_is_gone_is_refused(tmp_path: Path) -> None:
    attributes = made(tmp_path)
    save_joint(tmp_path, tiny.MODEL_SHA, attributes, PROFILE)
    del attributes[NAMES[1]]
    with pytest.raises(ArtifactError, match=r"names the attribute 'register/archaic', which is not below"):
        load_joint(tmp_path, tiny.MODEL_SHA, attributes)


def test_another_model_is_refused(tmp_path: Path) -> None:
    attributes = made(tmp_path)
    save_joint(tmp_path, tiny.MODEL_SHA, attributes, PROFILE)
    with pytest.raises(ArtifactError, match=r"measured on the model 5eed5eed5eed, this one is 000000000000"):
        load_joint(tmp_path, "0" * 64, attributes)


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda raw: [raw],
    "a field too many": lambda raw: raw | {"more": 1},
    "a field too few": lambda raw: {name: value for name, value in raw.items() if name != "unit"},
    "another format": lambda raw: raw | {"format": 2},
    "another unit": lambda raw: raw | {"unit": "raw"},
    "attributes as a list": lambda raw: raw | {"attributes": list(raw["attributes"])},
    "fewer attributes": lambda raw: raw | {"attributes": {}},
    "a model that is no text": lambda raw: raw | {"model_sha256": 5},
    "no profile": lambda raw: raw | {"profile": None},
    "a cost of 0": lambda raw: raw | {"profile": raw["profile"] | {"cost": [[[0.0, 0.0], [0.0, 0.0]]] * 2}},
    "a names that is a number": lambda raw: raw | {"profile": raw["profile"] | {"names": 3}},
}


@pytest.mark.parametrize("change", BREAKS)
def test_a_broken_file_is_refused(tmp_path: Path, change: str) -> None:
    attributes = made(tmp_path)
    save_joint(tmp_path, tiny.MODEL_SHA, attributes, PROFILE)
    path = tmp_path / "joint.json"
    path.write_text(json.dumps(BREAKS[change](json.loads(path.read_text()))))
    with pytest.raises(ArtifactError, match=r"joint\.json cannot be used: .*calibrate again"):
        load_joint(tmp_path, tiny.MODEL_SHA, attributes)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    attributes = made(tmp_path)
    save_joint(tmp_path, tiny.MODEL_SHA, attributes, PROFILE)
    path = tmp_path / "joint.json"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"joint\.json cannot be used"):
        load_joint(tmp_path, tiny.MODEL_SHA, attributes)


def test_only_attributes_that_are_on_disk_in_its_unit_are_saved(tmp_path: Path) -> None:
    attributes = made(tmp_path)
    with pytest.raises(ValueError, match=r"'register/archaic', which has not been loaded"):
        save_joint(tmp_path, tiny.MODEL_SHA, {NAMES[0]: attributes[NAMES[0]]}, PROFILE)
    tiny.attribute(tmp_path / NAMES[0], NAMES[0], unit="raw")
    with pytest.raises(ValueError, match=r"'topic/sports' is in unit raw"):
        save_joint(tmp_path, tiny.MODEL_SHA, loaded(tmp_path), PROFILE)
