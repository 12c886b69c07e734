"""What a calibration says of its outcome: shares with their intervals, and a warning where these overlap."""

from dataclasses import replace
from pathlib import Path

import pytest

from steerserve.calibrate.summary import interval, outcome_lines
from tests import tiny


@pytest.mark.parametrize(("steered", "unsteered", "warned"), [(0.9375, 0.125, False), (0.375, 0.125, True)])
def test_overlapping_intervals_are_told_and_warned_of(
    tmp_path: Path, steered: float, unsteered: float, warned: bool
) -> None:
    attribute = tiny.attribute(tmp_path, "who/king")
    won = {"layers": list(attribute.layers), "strength": attribute.strength, "share": steered, "texts": 16}
    ablation = {"confirmed": [won | {"loss_ratio": 1.0}], "unsteered": {"share": unsteered}, "note": None}
    lines = outcome_lines(replace(attribute, provenance={"ablation": ablation}))
    assert "12% of unsteered ones (3% to 36%)" in lines[1]
    assert any("not surely better than none" in line for line in lines) == warned


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_newcombes_table(successes: int, count: int, low: float, high: float) -> None:
    assert interval(successes / count, count) == pytest.approx((low, high), abs=5e-5)
