"""The instrument from end to end on a tiny model: every experiment, resumed, rendered and refused."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import steer
from bench.judges.model import JudgeConfig
from bench.judges.training import JudgeRecipe, train
from bench.steering import command
from bench.steering.analysis import efficiency, statistics
from bench.steering.plan.cells import Cell, plan
from bench.steering.plan.settings import Settings, SiteSettings
from bench.steering.records import Store
from bench.steering.texts.writing import Row, compose, params
from steerserve.calibrate.recipes import ProfileRecipe
from steerserve.calibrate.run import calibrate
from steerserve.config import EngineConfig
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import RequestError
from steerserve.runtime.load import load_runtime
from tests.bench.made import make_texts
from tests.calibrate.made import make_recipe, make_saes

SETTINGS = Settings(
    texts=4,
    side_texts=4,
    kl_texts=2,
    tokens=8,
    steps=4,
    factors=(0.5, 1.0),
    side_factors=(1.0,),
    set_factors=(1.0,),
    sets=1,
    order_texts=4,
    order_steps=(2, 4),
    order_weights=(0.3,),
    order_tokens=6,
    order_context=3,
    classifier_texts=60,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_texts(folder / "data")
    make_saes(folder / "saes", tiny_model)
    calibrate(tiny_model, folder / "saes", folder / "data", folder / "out", make_recipe(folder, order="random"))
    config = JudgeConfig(vocabulary=320, width=16, layers=1, heads=1, context=48)
    train(folder / "data", folder / "judge", config, JudgeRecipe(tokens=400, rows=2))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path, tiny_model: Path) -> DiffusionEngine:
    return load_runtime(tiny_model, folder / "saes", [folder / "out"], EngineConfig()).engine


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Few texts and few draws: what is tested is not how narrow intervals are."""
    patch.setattr(command, "FULL", SETTINGS)
    patch.setattr(command, "keep_freed_memory", lambda: False)
    patch.setattr(statistics, "DRAWS", 20)
    patch.setattr(efficiency, "DRAWS", 20)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shrink(monkeypatch)
    yield


def arguments(folder: Path, tiny_model: Path, out: Path, *more: str) -> list[str]:
    flags = {
        "data": folder / "data",
        "judge": folder / "judge",
        "model": tiny_model,
        "sae": folder / "saes",
        "attributes": folder / "out",
        "out": out,
    }
    return [*(part for name, value in flags.items() for part in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="module")
def measured(folder: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert steer.main(arguments(folder, tiny_model, out, "--keep-texts", str(out / "texts.jsonl"))) == 0
    return out


def cells(engine: DiffusionEngine, method: str) -> list[Cell]:
    return [cell for cell in plan(SETTINGS, engine.catalogue.attributes, ["single"]) if cell.method == method]


def test_rows_of_all_cells_share_their_noise(engine: DiffusionEngine) -> None:
    unsteered = cells(engine, "none")[0]
    steered = cells(engine, "uniform")[0]
    idle = [dict(push, strength=0.0) for push in steered.request["interventions"]]
    still = Cell(**(vars(steered) | {"request": steered.request | {"interventions": idle}, "kl_texts": 0}))
    plain, _ = compose(engine, unsteered, 7)
    assert [row.text for row in compose(engine, still, 7)[0]] == [row.text for row in plain]
    hard = [dict(push, strength=9.0) for push in steered.request["interventions"]]
    pushed = Cell(**(vars(steered) | {"request": steered.request | {"interventions": hard}}))
    assert [row.text for row in compose(engine, pushed, 7)[0]] != [row.text for row in plain]


def test_a_ranked_text_is_the_likeliest_of_its_candidates_to_have_all_attributes(engine: DiffusionEngine) -> None:
    pair = next(cell for cell in plan(SETTINGS, engine.catalogue.attributes, ["sets"]) if cell.method == "uniform")
    asked = {"verdicts": list(pair.attributes), "probes": ["of no account"]}
    alone, _ = compose(engine, Cell(**(vars(pair) | {"request": pair.request | asked, "kl_texts": 0})), 7)
    ranked = Cell(**(vars(pair) | {"request": pair.request | asked | {"best_of": 8}, "kl_texts": 0}))
    shown, _ = compose(engine, ranked, 7)
    assert ranked.work == 8 * Cell(**(vars(ranked) | {"request": pair.request})).work
    plain, _ = compose(engine, Cell(**(vars(pair) | {"kl_texts": 0})), 7)
    assert [row.text for row in alone] == [row.text for row in plain]

    def likely(row: Row) -> float:
        assert set(row.verdicts) == set(pair.attributes)
        return sum(float(np.log(1 / (1 + np.exp(-odds)))) for odds in row.verdicts.values())

    better = [likely(best) - likely(first) for best, first in zip(shown, alone, strict=True)]
    assert min(better) >= 0 and max(better) > 0
    kept = [one.text == other.text for one, other in zip(shown, alone, strict=True)]
    assert [gain == 0 for gain in better] == kept


def test_a_refined_text_is_likelier_than_the_same_text_as_it_was_first_written(engine: DiffusionEngine) -> None:
    pair = next(cell for cell in plan(SETTINGS, engine.catalogue.attributes, ["sets"]) if cell.method == "uniform")
    asked = {"verdicts": list(pair.attributes), "probes": ["of no account"]}
    first = Cell(**(vars(pair) | {"request": pair.request | asked, "kl_texts": 0}))
    rounds = {"refine": {"rounds": 6, "span": 3}}
    refined = Cell(**(vars(first) | {"request": first.request | rounds}))
    assert refined.work == pytest.approx(first.work * (1 + 6 * 3 / pair.request["max_tokens"]))
    before, after = compose(engine, first, 7)[0], compose(engine, refined, 7)[0]

    def likely(row: Row) -> float:
        return sum(float(np.log(1 / (1 + np.exp(-odds)))) for odds in row.verdicts.values())

    gains = [likely(late) - likely(early) for early, late in zip(before, after, strict=True)]
    assert min(gains) >= 0 and max(gains) > 0
    # A round that changes nothing scores no higher.
    assert [late.text != early.text for early, late in zip(before, after, strict=True)] == [one > 0 for one in gains]


def test_refinement_and_colder_sampling_are_tried_on_triples(engine: DiffusionEngine) -> None:
    one = next(iter(engine.catalogue.attributes.values()))
    attributes = {name: replace(one, name=name) for name in ("topic/a", "sentiment/b", "style/c")}
    found = {cell.method: cell for cell in plan(SETTINGS, attributes, ["sets"])}
    refined, cold = found["feedback at 0.6, refined"], found["feedback at 0.6"]
    assert refined.request["verdicts"] == list(refined.attributes) and refined.request["refine"]["rounds"] > 0
    assert cold.request["temperature"] == refined.request["temperature"] == 0.6
    assert "verdicts" not in cold.request and "temperature" not in found["feedback, refined"].request
    assert found["no push, refined"].request["interventions"] == []


def test_methods_that_rank_are_tried_on_triples_with_their_probes(engine: DiffusionEngine) -> None:
    known = engine.catalogue.attributes
    one = next(iter(known.values()))
    attributes = {name: replace(one, name=name) for name in ("topic/a", "sentiment/b", "style/c")}
    cells = [cell for cell in plan(SETTINGS, attributes, ["sets"]) if cell.candidates > 1]
    assert {cell.attributes for cell in cells} == {("topic/a", "sentiment/b", "style/c")}
    steered = [cell.factor for cell in cells if cell.method == "uniform, best of 8"]
    assert steered == list(SETTINGS.ranked_factors)
    [free] = [cell for cell in cells if cell.method == "no push, best of 8"]
    assert free.request["interventions"] == [] and free.request["verdicts"] == list(free.attributes)
    origin: dict[str, Any] = {"attributes": {}}
    assert one.probe is not None
    other = replace(one.probe, sha256="another")
    others = {name: replace(one, name=name, probe=other) for name in attributes}
    [again] = [cell for cell in plan(SETTINGS, others, ["sets"]) if cell.method == "no push, best of 8"]
    assert again.key(origin) != free.key(origin)


def test_a_field_that_the_engine_does_not_know_is_refused_by_name(engine: DiffusionEngine) -> None:
    cell = cells(engine, "uniform")[0]
    strange = Cell(**(vars(cell) | {"request": cell.request | {"telepathy": True}}))
    with pytest.raises(RequestError, match="telepathy"):
        params(strange, 7, 0)


def test_every_experiment_leaves_records_tables_and_figures(measured: Path) -> None:
    names = {path.name for path in measured.iterdir()}
    assert {"run.json", "summary.json", "tables.md", "cells.jsonl.gz", "texts.jsonl"} <= names
    assert {"frontiers.png", "frontiers-single.png", "commitment.png", "efficiency.png", "orders.png"} <= names
    summary = json.loads((measured / "summary.json").read_text())
    assert set(summary["orders"]) >= {"infill", "unconditional"}
    assert {"uniform", "commitment", "clamp"} <= set(summary["equal_quality"]["single"]["1.10"])
    assert summary["frontiers"][0]["share"][0] == summary["unsteered"]["share"][summary["frontiers"][0]["task"]]
    records = list(Store(measured / "cells.jsonl.gz").records.values())
    assert summary["texts"] == sum(len(record["rows"]["nats"]) for record in records)
    for record in records:
        lengths = {len(values) for name, values in record["rows"].items() if name not in ("odds", "has", "kl")}
        assert lengths == {4}
    lines = (measured / "tables.md").read_text().splitlines()
    assert "### Orders, infill" in lines
    assert "### What the measures say of real texts, and of joined stretches of real texts" in lines
    assert all(line.endswith("|") for line in lines if line.startswith("|"))


def test_what_cannot_be_had_is_said_and_the_rest_is_measured(measured: Path) -> None:
    summary = json.loads((measured / "summary.json").read_text())
    # The tiny attributes have no measured sensitivity.
    optimal = [why for name, why in summary["refused"].items() if name.startswith("optimal")]
    assert optimal and all("sensitivity" in why for why in optimal)
    assert "- Not available: optimal" in (measured / "tables.md").read_text()


def test_what_is_there_is_not_written_again(
    folder: Path, tiny_model: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (measured / "cells.jsonl.gz").read_bytes()
    summary = (measured / "summary.json").read_bytes()
    written: list[str] = []

    def noted(engine: Any, cell: Cell, *rest: Any) -> Any:
        made = compose(engine, cell, *rest)
        written.append(cell.method)
        return made

    monkeypatch.setattr("bench.steering.run.compose", noted)
    assert steer.main(arguments(folder, tiny_model, measured)) == 0
    assert written == []
    assert (measured / "cells.jsonl.gz").read_bytes() == before
    assert (measured / "summary.json").read_bytes() == summary
    printed = capsys.readouterr().out.strip().splitlines()
    assert "single" in json.loads(printed[-1])


def test_results_are_drawn_from_the_records_alone(measured: Path, tmp_path: Path) -> None:
    for name in ("cells.jsonl.gz", "run.json"):
        (tmp_path / name).write_bytes((measured / name).read_bytes())
    assert steer.main(["--render", "--out", str(tmp_path)]) == 0
    for name in ("summary.json", "tables.md"):
        assert (tmp_path / name).read_bytes() == (measured / name).read_bytes()
    text = (tmp_path / "tables.md").read_text()
    assert "### Orders, infill" in text and text.endswith(".png)\n") and "![frontiers](frontiers.png)" in text


def test_a_record_that_was_cut_short_is_left_out(measured: Path, tmp_path: Path) -> None:
    whole = list(Store(measured / "cells.jsonl.gz").records)
    path = tmp_path / "cells.jsonl.gz"
    store = Store(path)
    store.put("a", {"x": 1})
    store.put("b", {"x": 2})
    path.write_bytes(path.read_bytes()[:-15])
    again = Store(path)
    assert list(again.records) == ["a"]
    again.put("c", {"x": 3})
    assert list(Store(path).records) == ["a", "c"]
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == 2
    assert whole


def test_only_the_plan_writes_nothing(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steer.main(arguments(folder, tiny_model, tmp_path / "none", "--plan", "--only", "sets")) == 0
    assert "cells" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_each_attribute_at_one_layer_at_a_time_is_a_point(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ProfileRecipe(
        runs=3, run_tokens=12, run_steps=12, edges=(0, 20, 64), canvases=2, positions=2, judge_texts=60
    )
    monkeypatch.setattr(command, "SITES", SETTINGS)
    monkeypatch.setattr(command, "SITE_PROFILES", SiteSettings(recipe, nats=1.0, cost_slices=4))
    flags = ["--sites", str(tmp_path / "sites"), "--attribute", "deed/won"]
    assert steer.main(arguments(folder, tiny_model, tmp_path / "out", *flags, "--plan")) == 0
    assert "2 sites: 24 forward passes of one row for their strengths" in capsys.readouterr().err
    assert not (tmp_path / "sites").exists()
    for _ in range(2):
        assert steer.main(arguments(folder, tiny_model, tmp_path / "out", *flags)) == 0
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        points = summary["efficiency"]["points"]
        assert [(one["task"], one["method"]) for one in points] == [
            ("deed/won@0", "optimal"),
            ("deed/won@1", "optimal"),
        ]
        assert all(one["rho"] >= 1 and one["cost"] == "measured" for one in points)
    # The second time everything is there.
    assert "0 cells to run" in capsys.readouterr().err
    assert steer.main(arguments(folder, tiny_model, tmp_path / "out", *flags[:2], "--attribute", "who/king")) == 1
    assert "holds the sites ['deed/won@0', 'deed/won@1'], not ['who/king@0', 'who/king@1']" in capsys.readouterr().err
    for wrong, message in (
        (["--attribute", "who/king"], "--attribute must be given with --sites only"),
        ([*flags, "--only", "sets"], "leave out --only"),
        ([*flags[:2], "--attribute", "no/one"], "has no attribute 'no/one'; it has"),
    ):
        assert steer.main(arguments(folder, tiny_model, tmp_path / "out", *wrong)) == 1
        assert message in capsys.readouterr().err


def test_what_is_missing_is_an_error_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer.main(["--data", str(tmp_path), "--judge", str(tmp_path)]) == 1
    assert "holds no judge" in capsys.readouterr().err
    assert steer.main(["--judge", str(tmp_path)]) == 1
    assert "--data is needed" in capsys.readouterr().err
    assert steer.main(["--render", "--out", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err
