"""Putting the parts together: what does not belong together is refused before anything is served."""

import json
from pathlib import Path

import pytest

from steerserve.config import EngineConfig
from steerserve.errors import ArtifactError
from steerserve.models import weights_sha256
from steerserve.models.loading import load_model
from steerserve.runtime import load_runtime
from steerserve.steering.attribute import load_attribute
from tests import tiny


def attributes(tiny_model: Path, folder: Path, **changes: object) -> Path:
    """One attribute of the tests' own shape, said to be of `tiny_model`."""
    facts = load_model(tiny_model).facts
    assert facts.hidden_size == tiny.HIDDEN
    made = tiny.attribute(folder / "made", "topic/sports", (1,))
    path = folder / "made" / "attribute.json"
    raw = json.loads(path.read_text()) | {"model_sha256": weights_sha256(tiny_model)} | changes
    path.write_text(json.dumps(raw))
    assert made.name == raw["name"]
    return folder


def test_a_model_folder_with_attributes_is_served(tiny_model: Path, tmp_path: Path) -> None:
    runtime = load_runtime(tiny_model, None, attributes(tiny_model, tmp_path), EngineConfig())
    assert runtime.service.model_id == tiny_model.name
    assert list(runtime.service.attributes) == ["topic/sports"]
    assert runtime.service.capabilities["device"] == "cpu"
    assert runtime.service.model_card["sampler_defaults"]["order"] == "confidence"


def test_the_folder_one_stands_in_gives_the_model_its_name(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model)
    assert load_runtime(Path(), None, None, EngineConfig()).service.model_id == tiny_model.name


def test_the_models_own_sampler_defaults_are_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "order": "random", "bos_token_id": 2}')
    runtime = load_runtime(folder, None, None, EngineConfig())
    assert runtime.engine.catalogue.defaults.temperature == 0.5
    assert runtime.engine.catalogue.defaults.order == "random"
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(ArtifactError, match="temperature must be a float, got 'hot'"):
        load_runtime(folder, None, None, EngineConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unit": "bogus"}, "unit 'bogus'"),
        ({"scope": "nowhere"}, "scope 'nowhere'"),
        ({"schedule": {"type": "zz"}}, "unknown"),
        ({"profile": {"curve": [1.0]}}, "topic/sports"),
        ({"model_sha256": "00" * 32}, "another|calibrated for the model"),
    ],
)
def test_an_attribute_that_cannot_be_honoured_is_refused_at_start(
    tiny_model: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        load_runtime(tiny_model, None, attributes(tiny_model, tmp_path, **changes), EngineConfig())


def test_directions_without_a_site_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    root = attributes(tiny_model, tmp_path, sites={})
    with pytest.raises(ArtifactError, match="no site"):
        load_attribute(root / "made", weights_sha256(tiny_model), 2, tiny.HIDDEN)
