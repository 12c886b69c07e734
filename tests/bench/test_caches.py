"""The bench of approximate decoding on a tiny model: what it runs, compares and writes."""

import json
from pathlib import Path

import pytest

from bench import caches


def test_every_variant_is_run_and_compared(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "caches.json"
    sizes = ["--tokens", "16", "--blocks", "8", "--batches", "2", "--rows", "2", "--rounds", "1"]
    caches.main(["--model", str(tiny_model), "--out", str(out), *sizes])
    records = {one["variant"]: one for one in json.loads(out.read_text())["records"]}
    assert set(records) == set(caches.VARIANTS)
    assert records["exact"]["agreement"] == records["exact"]["speed"]["median"] == 1
    assert records["dual"]["forwards_per_row"] == records["exact"]["forwards_per_row"] == 16
    assert all(0 <= one["agreement"] <= 1 for one in records.values())
    assert out.with_suffix(".md").read_text().count("\n| 16 | 8 | 2 |") == len(records)
    assert "dual and threshold" in capsys.readouterr().out
