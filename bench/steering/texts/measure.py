"""The record of a cell: a few whole numbers a text, from which every table and figure is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.judges.scoring import QualityJudge
from bench.steering.plan.cells import INFILL, Cell
from bench.steering.texts.classifiers import Classifiers
from bench.steering.texts.diversity import distinct, self_bleu, words
from bench.steering.texts.writing import Passage, Row, measured_kl
from steerserve.steering.attribute import Attribute

NEIGHBOURS = 24
"""Texts of a cell among which self-BLEU is taken: it takes all pairs, and grows with their number."""
ODDS, NATS, SHARES, KL = 100, 100, 1000, 100_000
"""What values are multiplied by before they are rounded."""


@dataclass(frozen=True)
class Judges:
    """All that texts are measured with."""

    quality: QualityJudge
    classifiers: Classifiers


def measure(
    cell: Cell,
    rows: Sequence[Row],
    plan: Mapping[str, Any],
    judges: Judges,
    attributes: Mapping[str, Attribute],
    passages: Sequence[Passage] = (),
) -> dict[str, Any]:
    """The record of a cell: facts of the whole, and `rows` with a list over the texts for each figure."""
    texts = [row.text for row in rows]
    verdicts = judges.quality.judge(texts)
    split = [words(text) for text in texts]
    odds, has = judges.classifiers.read(texts)
    found: dict[str, Any] = {
        "nats": [round(NATS * one.nats) for one in verdicts],
        "bytes": [one.bytes for one in verdicts],
        "distinct_1": [round(SHARES * distinct(one, 1)) for one in split],
        "distinct_2": [round(SHARES * distinct(one, 2)) for one in split],
        "odds": {name: np.rint(ODDS * values).astype(int).tolist() for name, values in odds.items()},
        # One character a text: a list of truth values would be the longest of all.
        "has": {name: "".join("01"[int(one)] for one in values) for name, values in has.items()},
    }
    kl = [measured_kl(row.receipt, len(row.tokens)) for row in rows[: cell.kl_texts]]
    if kl and all(one is not None for one in kl):
        found["kl"] = [round(KL * one) for one in kl if one is not None]
    if cell.task == INFILL:
        found["right"] = [
            sum(a == b for a, b in zip(row.tokens, passage.middle, strict=False))
            for row, passage in zip(rows, passages, strict=True)
        ]
    pushes = plan["interventions"]
    return {
        "self_bleu": round(self_bleu(split[:NEIGHBOURS]), 4),
        # Of a closed loop no gains are known before.
        "gains": [[round(gain, 4) for gain in push["schedule"]["gains"] or ()] for push in pushes],
        "rho": [push.get("rho") for push in pushes],
        "predicted_kl": [push.get("predicted_kl") for push in pushes],
        "peak": _peak(cell, rows, attributes),
        "notes": sorted({note for push in pushes for note in push["notes"]}),
        "rows": found,
    }


def _peak(cell: Cell, rows: Sequence[Row], attributes: Mapping[str, Attribute]) -> float | None:
    """Largest strength of a step, in multiples of the attribute's own, mean over rows and pushes; None without one.

    From the receipts: of a closed loop nothing is known before.
    """
    found = []
    for row in rows:
        for push, asked in zip(row.receipt.get("interventions", ()), cell.request["interventions"], strict=False):
            name = asked.get("attribute")
            if name is None or asked.get("op", "add") != "add" or not push["strength_per_step"]:
                return None
            found.append(max(abs(one) for one in push["strength_per_step"]) / abs(attributes[name].strength))
    return round(float(np.mean(found)), 4) if found else None
