"""Schedules compiled once: the same tables as compiling anew, of the very attribute, bounded, from any thread."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from schedulers import CommitmentProfile, build_strength, compile_gains
from steerserve.engine.admission import catalogue
from steerserve.engine.admission.catalogue import CompiledSchedules
from steerserve.engine.api.params import SLICES
from tests import tiny

CHOICES = (
    "uniform",
    {"type": "commitment", "blocks": 4},
    {"type": "window", "start": 0.25, "stop": 0.5},
    {"type": "piecewise", "points": [[0.0, 1.0], [1.0, 0.5]], "norm": "mean"},
)


def test_a_kept_table_is_the_one_that_compiling_anew_gives(tmp_path: Path) -> None:
    attribute = tiny.attribute(tmp_path, "topic/sports", cost=True)
    profile = CommitmentProfile.from_json(attribute.profile or {})
    schedules = CompiledSchedules()
    for choice in CHOICES:
        for op in ("add", "clamp"):
            schedule, norm = build_strength(choice)
            fresh = compile_gains(schedule, norm or ("peak" if op == "clamp" else None), profile, SLICES)
            for _ in range(2):
                kept = schedules.schedule(choice, attribute, op)
                assert torch.equal(kept.table.gains, fresh.gains)
                assert list(kept.gains) == fresh.gains.tolist()
                assert (kept.table.norm, kept.table.rho, kept.table.note) == (fresh.norm, fresh.rho, fresh.note)
    assert schedules.schedule("commitment", attribute, "add") is schedules.schedule("commitment", attribute, "boost")
    assert schedules.profile(attribute) is schedules.profile(attribute)


def test_another_attribute_of_the_same_name_has_tables_of_its_own(tmp_path: Path) -> None:
    schedules = CompiledSchedules()
    first = tiny.attribute(tmp_path / "a", "topic/sports")
    second = replace(first, profile=CommitmentProfile(tuple(float(i > 32) for i in range(65))).to_json())
    early, late = (schedules.schedule("commitment", one, "add") for one in (first, second))
    assert early.gains != late.gains
    with pytest.raises(ValueError, match="needs a commitment profile"):
        schedules.schedule("commitment", None, "add")


def test_what_cannot_be_compiled_is_refused_every_time() -> None:
    schedules = CompiledSchedules()
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown schedule"):
            schedules.schedule("sometimes", None, "add")
    assert len(schedules) == 0
    assert schedules.schedule({"type": "uniform", "norm": "peak"}, None, "add").gains == (1.0,) * SLICES


def test_no_more_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MOST", 8)
    schedules = CompiledSchedules()
    with ThreadPoolExecutor(4) as pool:
        starts = [i % 24 / 100 for i in range(200)]
        tables = list(
            pool.map(
                lambda start: schedules.schedule({"type": "window", "start": start, "stop": 0.5}, None, "add"), starts
            )
        )
    assert len(schedules) == 8
    for start, table in zip(starts, tables, strict=True):
        schedule, norm = build_strength({"type": "window", "start": start, "stop": 0.5})
        assert list(table.gains) == compile_gains(schedule, norm, None, SLICES).gains.tolist()
