"""The steering bench on a tiny model: what it pairs, what it keeps and what it prints."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import steer
from steerserve.calibrate.run import calibrate
from steerserve.config import EngineConfig
from steerserve.engine.params import Intervention
from steerserve.engine.torch_engine import TorchEngine
from steerserve.runtime import load_runtime
from steerserve.train.classifiers import train_judge
from tests.calibrate.made import make_data, make_recipe, make_saes

SETTINGS = steer.Settings(4, 3, 8, 4, None, None, 2, 60, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_data(folder / "data")
    make_saes(folder / "saes", tiny_model)
    calibrate(tiny_model, folder / "saes", folder / "data", folder / "out", make_recipe(folder, order="random"))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path, tiny_model: Path) -> TorchEngine:
    return load_runtime(tiny_model, folder / "saes", folder / "out", EngineConfig()).engine


def test_a_row_and_its_baseline_share_their_noise(engine: TorchEngine) -> None:
    plain = steer.compose(engine, SETTINGS, 4, [])
    idle = steer.compose(engine, SETTINGS, 3, [Intervention(attribute="who/king", strength=0.0)])
    assert idle.texts == plain.texts[:3]
    assert idle.losses == pytest.approx(plain.losses[:3], rel=1e-4)
    assert steer.compose(engine, SETTINGS, 4, [Intervention(attribute="who/king", strength=5.0)]) != plain


def test_figures_are_those_of_the_rows_that_both_have() -> None:
    texts = {"up": [f"up we go {i}" for i in range(40)], "down": [f"down we go {i}" for i in range(40)]}
    judge = train_judge(texts, 0)
    unsteered = steer.Texts(("down we go",) * 4, (1.0, 2.0, 3.0, 100.0), (1.0, 1.0, 1.0, 0.0))
    steered = steer.Texts(("up we go", "up up", "down"), (2.0, 4.0, 6.0), (0.5, 0.5, 0.8))
    found = steer.compare(judge, "up", steered, unsteered)
    assert (found["texts"], found["share"]) == (3, 2 / 3)
    # Every pair's ratio is 2, so the interval has no width.
    assert found["loss_ratio_interval"] == pytest.approx((2.0, 2.0))
    assert (found["loss_ratio"], found["loss"]) == (2.0, 4.0)
    assert found["distinct_2"] == pytest.approx(0.6)
    assert found["share_interval"][0] < 2 / 3 < found["share_interval"][1]


def test_every_attribute_is_measured_with_its_controls(engine: TorchEngine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "steer.json"
    report = steer.run(engine, folder / "data", out, SETTINGS)
    assert json.loads(json.dumps(report)) == json.loads(out.read_text())
    assert list(report["attributes"]) == list(engine.catalogue.attributes)
    for one in report["attributes"].values():
        assert one["unsteered"]["loss_ratio"] == 1.0
        assert [one[name]["texts"] for name in ("steered", "diff_means", "uniform")] == [4, 3, 3]
    lines = steer.table(report).splitlines()
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1
    assert set(steer.summary(report)) == set(report["attributes"])


def test_what_was_measured_is_kept_until_something_changes(engine: TorchEngine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "steer.json"
    report = json.loads(json.dumps(steer.run(engine, folder / "data", out, SETTINGS)))
    marked: dict[str, Any] = json.loads(out.read_text())
    marked["attributes"]["who/king"]["strength"] = "kept"
    marked["attributes"]["who/crew"] |= {"strength": "stale", "sha256": "aa"}
    out.write_text(json.dumps(marked))
    again = json.loads(json.dumps(steer.run(engine, folder / "data", out, SETTINGS)))
    assert again["attributes"]["who/king"]["strength"] == "kept"
    assert again["attributes"]["who/crew"] == report["attributes"]["who/crew"]
    out.write_text(json.dumps(marked))
    other = steer.run(engine, folder / "data", out, replace(SETTINGS, quality_masks=1))
    assert other["attributes"]["who/king"]["strength"] != "kept"


def test_texts_are_written_as_the_strengths_were_calibrated(engine: TorchEngine) -> None:
    settings = steer.as_calibrated(SETTINGS, engine.catalogue.attributes.values())
    assert asdict(settings) == asdict(SETTINGS) | {"order": "random"}


def test_the_command_prints_a_table_and_ends_in_json(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steer, "QUICK", SETTINGS)
    monkeypatch.setattr(steer, "keep_freed_memory", lambda: False)
    flags = {"data": folder / "data", "model": tiny_model, "sae": folder / "saes", "attributes": folder / "out"}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert steer.main([*arguments, "--quick", "--out", str(tmp_path / "a" / "b.json")]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[0].startswith("| attribute |") and set(json.loads(printed[-1])) == {
        "who/king",
        "who/crew",
        "deed/won",
    }
    assert (tmp_path / "a" / "b.md").read_text().splitlines() == printed[:-1]


def test_a_missing_folder_is_an_error_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer.main(["--data", str(tmp_path), "--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
