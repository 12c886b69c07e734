"""`steerserve inspect model`: whether a folder can be served, as what, and what it lacks."""

import json
from pathlib import Path
from typing import Any

import pytest

from steerserve.cli import main
from tests import tiny
from tests.models.families import huggingface_reference as reference


def facts(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> dict[str, Any]:
    assert main(["inspect", "model", str(folder), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["facts"]
    return found


def test_a_folder_tells_as_what_it_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference.write(tmp_path, "a2d-qwen3")
    capsys.readouterr()
    found = facts(capsys, tmp_path)
    assert (found["can_be_served"], found["lacks"]) == (True, [])
    assert (found["family"], found["attention"], found["shift"]) == ("a2d-qwen3", "full", 0)
    assert (found["mask_token"], found["caches"]) == ("[MASK]", ["prefix", "dual"])
    assert found["sampler_defaults"]["temperature"] == 0.0
    assert "KiB in float32" in found["memory"]
    said = facts(capsys, tmp_path, "--denoiser", "shift=1,attention=block,block_length=8")
    assert (said["shift"], said["caches"]) == (1, [])
    assert said["attention"] == "full within blocks of 8 positions, causal between them"
    assert main(["inspect", "model", str(tmp_path)]) == 0
    assert "can_be_served" in capsys.readouterr().out


def test_windows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference.write(tmp_path, "modernbert")
    capsys.readouterr()
    found = facts(capsys, tmp_path)
    assert (found["attention"], found["caches"]) == ("full; at layers 1 within 4 positions", [])


def test_a_folder_tells_all_that_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference.write(tmp_path, "a2d-qwen3")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"order": "nothing"}), encoding="utf-8")
    capsys.readouterr()
    found = facts(capsys, tmp_path)
    assert found["can_be_served"] is False
    tokenizer, order = found["lacks"]
    assert "--tokenizer DIR" in tokenizer
    assert "nothing" in order
    assert found["mask_id"] == tiny.MASK


def test_an_autoregressive_folder_is_refused_with_the_flag_that_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference.write(tmp_path, "a2d-qwen3")
    reference.change(tmp_path, model_type="qwen3")
    capsys.readouterr()
    assert main(["inspect", "model", str(tmp_path)]) == 2
    assert "--denoiser mask_token=TOKEN,shift=0|1" in capsys.readouterr().err
