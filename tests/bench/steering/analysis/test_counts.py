"""How many texts the figures of a run rest on."""

from typing import Any

from bench.steering.analysis.counts import count_texts, counts_line


def record(experiment: str, task: str, method: str, texts: int, kl: int = 0) -> dict[str, Any]:
    rows: dict[str, Any] = {"nats": [100] * texts} | ({"kl": [1] * kl} if kl else {})
    return {"experiment": experiment, "task": task, "method": method, "rows": rows}


def test_texts_are_counted_in_the_records() -> None:
    records = [
        record("single", "unsteered", "none", 40),
        record("single", "a/x", "uniform", 30, 5),
        record("controls", "a/x", "clamp", 13, 5),
        record("sets", "a/x + b/y", "uniform", 16, 6),
        record("sets", "a/x + b/y + c/z", "uniform, best of 8", 12),
    ]
    counts = count_texts(records)
    assert counts["texts"] == {"single": [13, 30], "pairs": [16], "triples": [12]}
    assert counts["kl"] == [5, 6]
    # Self-BLEU is of 24 texts at most.
    assert counts["self_bleu"] == [12, 13, 16, 24]
    text = counts_line(counts)
    assert "single 13 or 30, pairs 16, triples 12" in text
    assert "first 5 or 6 texts" in text and "first 12, 13, 16 or 24" in text


def test_a_run_without_measured_kl_says_so() -> None:
    counts = count_texts([record("single", "unsteered", "none", 12), record("orders", "infill", "random", 8)])
    assert counts == {"texts": {"orders": [8]}, "kl": [], "self_bleu": [8]}
    assert counts_line(counts).startswith("Texts a cell: orders 8. KL was not measured")


def test_nothing_is_said_of_no_records() -> None:
    assert counts_line(count_texts([record("single", "unsteered", "none", 12)])) == ""
