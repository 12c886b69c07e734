"""The bench of limits on KL on a tiny model: what it runs, compares and writes."""

import json
from pathlib import Path

from bench import max_kl
from steerserve.engine.api.params import GenerationParams
from tests import tiny
from tests.engine import priced


def test_every_push_meets_every_limit(tmp_path: Path) -> None:
    engine = priced.engine(tiny.bert(), tmp_path)
    base = GenerationParams(prompt="the", max_tokens=8, steps=4, ignore_eos=True)
    records = list(max_kl.measure(engine, base, strengths=(3.0, 8.0), features=2, texts=3, batch=2))
    # One attribute and both features have no calibrated cost.
    assert len(records) == 3 * 4 + 3 * 3
    held = [one for one in records if one["limit"] == "max_kl"]
    assert all(one["over"] == 0 and one["largest"] <= one["asked"] for one in held)
    assert {one["texts"] for one in records} == {len(one["each"]) for one in records} == {3}
    assert any(one["passes"] > 3 * 4 for one in held)
    # What is known is not run again.
    known = [one | {"passes": -1} for one in records[:2]]
    again = list(max_kl.measure(engine, base, (3.0, 8.0), 2, 3, 2, known))
    assert [one["passes"] for one in again[:2]] == [-1, -1] and again[2:] == records[2:]
    out = tmp_path / "results" / "max_kl.json"
    settings = {"family": "bert", "device": "cpu", "texts": 3, "tokens": 8, "steps": 4, "strength": 3.0}
    settings["feature_strength"] = 8.0
    max_kl.write(settings | {"records": records}, out)
    assert json.loads(out.read_text())["records"] == records
    assert out.with_suffix(".md").read_text().count("of 3 |") == len(records) - 6
