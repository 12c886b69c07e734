"""Orders on records whose answers are known."""

from typing import Any

import pytest

from bench.steering.analysis.orders import mean_score, orders

ROWS = 20


def record(order: str, weight: float | None, right: list[int], nats: int, task: str = "infill") -> dict[str, Any]:
    choice = {"type": order} | ({} if weight is None else {"weight": weight})
    return {
        "experiment": "orders",
        "task": task,
        "method": order if weight is None else f"{order} {weight:g}",
        "factor": 8.0,
        "self_bleu": 0.2,
        "request": {"max_tokens": 10, "interventions": [], "order": choice},
        "rows": {"right": right, "nats": [100 * nats] * ROWS, "bytes": [10] * ROWS, "distinct_2": [800] * ROWS},
    }


def test_an_informed_order_is_compared_with_the_best_confident_one() -> None:
    told = orders(
        [
            record("random", None, [1] * ROWS, 30),
            record("confidence", None, [2] * ROWS, 20),
            record("margin", None, [4] * ROWS, 20),
            record("sae_stability", 0.3, [3] * ROWS, 20),
            record("sae_stability", 0.6, [6] * ROWS, 20),
        ]
    )["infill"]["8"]
    assert told["random"]["accuracy"] == pytest.approx(0.1)
    assert told["random"]["nats_per_byte"] == pytest.approx(3.0)
    assert told["sae_stability"]["weights"] == [0.6]
    assert told["sae_stability"]["lead"] == pytest.approx(0.6 - 0.4)
    assert told["sae_stability"]["lead_interval"] == pytest.approx((0.2, 0.2))
    assert told["sae_stability"]["p"] < 0.01
    assert "lead" not in told["confidence"]


def test_a_weight_is_not_reported_on_the_rows_that_chose_it() -> None:
    # Each weight is good on one half alone, so what the one half chooses is bad on the other.
    even = [10 if row % 2 == 0 else 0 for row in range(ROWS)]
    odd = [10 - value for value in even]
    told = orders([record("sae_stability", 0.3, even, 20), record("sae_stability", 0.6, odd, 20)])["infill"]["8"]
    assert told["sae_stability"]["accuracy"] == 0.0
    assert told["sae_stability"]["weights"] == [0.3, 0.6]


def test_text_that_is_written_freely_is_judged_by_its_loss() -> None:
    free = record("random", None, [], 30, task="unconditional")
    del free["rows"]["right"]
    scores, name = mean_score(free)
    assert name == "quality"
    assert scores.tolist() == pytest.approx([-3.0] * ROWS)


def test_an_order_that_repeats_itself_is_not_the_best_for_its_low_loss() -> None:
    cells = [
        record(name, weight, [], nats, task="unconditional")
        for name, weight, nats in (
            ("random", None, 30),
            ("confidence", None, 5),
            ("margin", None, 20),
            ("sae_stability", 0.3, 18),
        )
    ]
    for cell in cells:
        del cell["rows"]["right"]
    cells[1]["rows"]["distinct_2"] = [200] * ROWS
    told = orders(cells)["unconditional"]["8"]
    # Against margin, 2.0 nats a byte, not against confidence's repetitions.
    assert told["sae_stability"]["lead"] == pytest.approx(2.0 - 1.8)
    assert told["confidence"]["nats_per_byte"] == pytest.approx(0.5)
