"""The results in the repository are still what its code makes of their records."""

import json
from pathlib import Path
from typing import Any

import pytest

import bench
from bench.steering.analysis import efficiency, statistics
from bench.steering.report.render import render

RESULTS = Path(bench.__path__[0]) / "results"


@pytest.mark.parametrize("name", ["steer", "steer-sets", "steer-orders"])
def test_a_recorded_run_is_read_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure but the intervals, which take more draws than are made here."""
    monkeypatch.setattr(statistics, "DRAWS", 5)
    monkeypatch.setattr(efficiency, "DRAWS", 5)
    monkeypatch.setattr("bench.steering.report.render.draw", lambda *_: [])
    for file in ("run.json", "cells.jsonl.gz"):
        (tmp_path / file).write_bytes((RESULTS / name / file).read_bytes())
    render(tmp_path)
    before, now = (json.loads((folder / "summary.json").read_text()) for folder in (RESULTS / name, tmp_path))
    assert before["texts"] == now["texts"] > 500
    # Rounding of sums may differ between machines in the last place.
    assert _without_intervals(now) == pytest.approx(_without_intervals(before), rel=1e-4, abs=2e-4)
    headings = [
        [line for line in (folder / "tables.md").read_text().splitlines() if line.startswith(("#", "| method"))]
        for folder in (RESULTS / name, tmp_path)
    ]
    assert headings[0] == headings[1] and headings[0]


@pytest.mark.parametrize(("name", "field"), [("steer", "kl_texts"), ("steer-sets", "kl_texts"), ("steer-orders", None)])
def test_a_recorded_run_says_how_many_texts_it_measured(name: str, field: str | None) -> None:
    settings = json.loads((RESULTS / name / "run.json").read_text())["settings"]
    head = (RESULTS / name / "tables.md").read_text().split("###")[0]
    expected = (
        f"KL is of the first {settings[field]} texts" if field else f"orders {settings['order_texts']}. KL was not"
    )
    assert expected in head
    assert name != "steer" or f"single {settings['side_texts']} or {settings['texts']}." in head
    assert name != "steer-sets" or f"triples {settings['ranked_texts']} or {settings['texts']}." in head


def _without_intervals(value: Any, place: str = "") -> dict[str, float]:
    """Every number of a summary by its place in it."""
    if isinstance(value, dict):
        parts = [_without_intervals(one, f"{place}/{name}") for name, one in value.items() if "interval" not in name]
    elif isinstance(value, list):
        # A direction's shift has its interval behind it.
        value = value[:1] if place.startswith("/directions") else value
        parts = [_without_intervals(one, f"{place}/{i}") for i, one in enumerate(value)]
    else:
        return {place: float(value)} if isinstance(value, int | float) else {}
    return {name: one for part in parts for name, one in part.items()}
