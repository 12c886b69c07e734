"""What pushes do to each other's attributes, on records whose answers are known."""

from typing import Any

import pytest

from bench.steering.analysis.interference import interference
from bench.steering.report.tables import crosstalk_table, set_table


def record(task: str, method: str, factor: float, odds: dict[str, list[float]], has: dict[str, str]) -> dict[str, Any]:
    """A cell with these log-odds, in nats, and marks."""
    return {
        "experiment": "sets" if " + " in task else "single",
        "task": task,
        "method": method,
        "factor": factor,
        "rows": {"odds": {name: [round(100 * one) for one in values] for name, values in odds.items()}, "has": has},
    }


UNSTEERED = record("unsteered", "none", 0.0, {"a/x": [0, 1, 2, 3], "b/y": [0, 0, 0, 0]}, {"a/x": "0011", "b/y": "0101"})


def test_crosstalk_is_of_the_strength_nearest_to_the_own_and_of_rows_that_share_noise() -> None:
    records = [
        UNSTEERED,
        record("a/x", "uniform", 0.5, {"a/x": [9, 9], "b/y": [9, 9]}, {"a/x": "11", "b/y": "00"}),
        record("a/x", "uniform", 1.1, {"a/x": [2, 4], "b/y": [-1, -2]}, {"a/x": "11", "b/y": "00"}),
        record("a/x", "optimal", 1.0, {"a/x": [9, 9], "b/y": [9, 9]}, {"a/x": "11", "b/y": "00"}),
    ]
    told = interference(records, {"a": 0.9, "b": 0.8})
    [shifts] = told["crosstalk"].values()
    assert {name: one["shift"] for name, one in shifts.items()} == {"a/x": 2.5, "b/y": -1.5}
    low, high = shifts["a/x"]["interval"]
    assert 2.0 <= low <= 2.5 <= high <= 3.0
    assert crosstalk_table(told["crosstalk"]).splitlines()[-1] == "| a/x | +2.5 | -1.5 |"


def test_a_set_is_taken_apart() -> None:
    task, odds = "a/x + b/y", {"a/x": [0.0] * 4, "b/y": [0.0] * 4}
    records = [
        UNSTEERED,
        record(task, "optimal", 1.5, odds, {"a/x": "1111", "b/y": "1000"}),
        record(task, "uniform", 0.5, odds, {"a/x": "1100", "b/y": "0110"}),
    ]
    told = interference(records, {"a": 0.9, "b": 0.8})
    assert told["sets"] == {
        task: {
            "uniform": {"0.5": {"a/x": 0.5, "b/y": 0.5, "all": 0.25}},
            "optimal": {"1.5": {"a/x": 1.0, "b/y": 0.25, "all": 0.25}},
        }
    }
    assert told["recognised"] == {task: pytest.approx(0.72)}
    assert set_table(told["sets"], told["recognised"]).splitlines()[2:] == [
        "| a/x + b/y | 72 % | uniform | 50 %, 50 %: 25 % | - |",
        "| a/x + b/y | 72 % | optimal | - | 100 %, 25 %: 25 % |",
    ]


def test_runs_of_neither_have_neither() -> None:
    assert interference([], {}) == {"crosstalk": {}, "sets": {}, "recognised": {}}
