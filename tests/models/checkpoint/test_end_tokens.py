"""The tokens that a text ends at: all that the files of a checkpoint name, one or a list."""

import json
from pathlib import Path
from typing import Any

import pytest

from steerserve.errors import ArtifactError
from steerserve.models import load_model, open_checkpoint
from tests.calibrate.made import make_family

ENDS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (7, None, (7,)),
    ([7], None, (7,)),
    ([7, 9], None, (7, 9)),
    ([9, 7, 9], None, (9, 7)),
    (7, 7, (7,)),
    (7, 9, (7, 9)),
    (7, [9, 7, 11], (7, 9, 11)),
    ([7, 9], [11], (7, 9, 11)),
]


@pytest.mark.parametrize("family", ["llada", "dream", "mdlm"])
def test_every_end_token_that_a_file_names_ends_a_text(tiny_model: Path, tmp_path: Path, family: str) -> None:
    folder = make_family(tmp_path / "model", family, tiny_model)
    config = json.loads((folder / "config.json").read_text())
    for own, generation, ends in ENDS:
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": own}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        facts = open_checkpoint(folder).facts
        assert (facts.eos_id, facts.end_ids) == (ends[0], ends)
    assert load_model(folder).facts.end_ids == (7, 9, 11)


def test_an_end_that_only_the_generation_config_names_is_the_end_of_text(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", "llada", tiny_model)
    config = json.loads((folder / "config.json").read_text())
    nothing: list[dict[str, Any]] = [{}, {"eos_token_id": None}, {"eos_token_id": []}]
    for said in nothing:
        left = {name: value for name, value in config.items() if name != "eos_token_id"}
        (folder / "config.json").write_text(json.dumps(left | said))
        (folder / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": [9, 7]}')
        assert open_checkpoint(folder).facts.end_ids == (9, 7)


@pytest.mark.parametrize("value", ["2", [2, "3"], True, 1.0, {"id": 2}, [2, 10_000], -1])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_is_refused(tiny_model: Path, tmp_path: Path, file: str, value: object) -> None:
    folder = make_family(tmp_path / "model", "llada", tiny_model)
    path = folder / file
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw | {"eos_token_id": value}))
    with pytest.raises(ArtifactError, match="eos"):
        open_checkpoint(folder)


@pytest.mark.parametrize("family", ["llada", "dream", "mdlm"])
def test_two_files_that_name_two_masks_are_refused(tiny_model: Path, tmp_path: Path, family: str) -> None:
    folder = make_family(tmp_path / "model", family, tiny_model)
    mask = open_checkpoint(folder).facts.mask_id
    path = folder / "generation_config.json"
    for said in (mask, None):
        path.write_text(json.dumps({"mask_token_id": said}))
        assert open_checkpoint(folder).facts.mask_id == mask
    for other in (mask + 1, str(mask)):
        path.write_text(json.dumps({"mask_token_id": other}))
        with pytest.raises(ArtifactError, match=f"generation_config.json: mask_token_id is {other!r}, .*{mask}"):
            open_checkpoint(folder)
