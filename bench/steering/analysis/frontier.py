"""Share and cost that a method reaches for a task as its strength rises, row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.steering.analysis.statistics import Floats, Ints, crossing, weights
from bench.steering.plan.targets import kind
from bench.steering.texts.measure import KL, NATS, ODDS, SHARES

Record = Mapping[str, Any]
DISTINCT_WITHIN = 0.9
"""Share of the unsteered texts' distinct-2 that texts must keep to be of equal quality; calibration asks the same."""
FINE = 81
"""Strengths, interpolated, among which one is chosen."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """Rows of one task and method, over strengths from 0 (the unsteered rows) to the largest; rows share their
    noise."""

    task: str
    method: str
    factors: Floats
    """[F] in multiples of the attributes' own strengths, the first 0."""
    has: Floats
    """[F, rows] 1 where the text has every attribute of the task."""
    odds: Floats
    """[F, rows] mean log-odds of the task's attributes."""
    nats: Floats
    """[F, rows] of the whole text under the judge."""
    bytes: Floats
    """[F, rows]"""
    kl: Floats | None
    """[F, first rows] nats a response token; None where it was not measured."""
    peak: Floats | None
    """[F] largest strength of a step in the attributes' own; None where the method's unit is another."""
    off_target: Floats
    """[F] mean |change of share| of the attributes of other kinds."""
    distinct: Floats
    """[F, rows] distinct-2 of each text."""
    self_bleu: Floats
    """[F]"""

    @property
    def rows(self) -> int:
        """How many texts there are at every strength."""
        return int(self.has.shape[1])

    def first(self, rows: int) -> "Frontier":
        """The same of the first rows only."""
        names = ("has", "odds", "nats", "bytes", "distinct")
        return Frontier(**(vars(self) | {name: getattr(self, name)[:, :rows] for name in names}))

    @property
    def distinct_2(self) -> Floats:
        """[F] mean over rows."""
        found: Floats = self.distinct.mean(1)
        return found

    def shares(self, index: Ints) -> Floats:
        """Share that has the target [draws, F] among the rows of each draw [draws, rows]."""
        found: Floats = self.has[:, index].mean(-1).T
        return found

    def ratios(self, index: Ints) -> Floats:
        """Judge's nats a byte over those of the unsteered rows [draws, F], all texts of a draw taken together."""
        loss = self.nats[:, index].sum(-1) / self.bytes[:, index].sum(-1)
        ratio: Floats = (loss / loss[0]).T
        return ratio

    def shifts(self, index: Ints) -> Floats:
        """Rise of the mean log-odds over the unsteered rows [draws, F]."""
        found: Floats = (self.odds - self.odds[0])[:, index].mean(-1).T
        return found

    def root_kl(self, index: Ints) -> Floats:
        """Square root of the mean KL [draws, F], of draws of the rows that it was measured on; of the strength, which
        it is proportional to where all schedules predict one cost, where it was not measured."""
        if self.kl is None:
            return np.broadcast_to(self.factors, (len(index), len(self.factors)))
        found: Floats = np.sqrt(np.maximum(self.kl[:, index].mean(-1), 0.0)).T
        return found

    def best(self, bound: float, chosen: Ints, reported: Ints) -> tuple[Floats, Floats, Floats]:
        """Share, loss ratio and strength [draws each] of the strength with the largest share within a loss ratio.

        It is chosen on some rows [draws, a], between grid values by interpolation, and reported on others [draws, b].
        Since repetition lowers a loss, distinct-2 must also keep to DISTINCT_WITHIN of the unsteered rows'. Strength 0
        is always within.
        """
        fine = np.linspace(0.0, self.factors[-1], FINE)
        mix = weights(fine, self.factors).T
        share, ratio = self.shares(chosen) @ mix, self.ratios(chosen) @ mix
        varied = self.distinct[:, chosen].mean(-1).T
        within = (ratio <= bound) & (varied @ mix >= DISTINCT_WITHIN * varied[:, :1])
        place = np.where(within, share, -1.0).argmax(axis=1)
        at = fine[place]
        return self.at(self.shares(reported), at), self.at(self.ratios(reported), at), at

    def at(self, curve: Floats, factor: Floats) -> Floats:
        """Curves [draws, F] at a strength each [draws]; NaN where the strength is."""
        held = np.nan_to_num(factor)
        values: Floats = (curve * weights(held, self.factors)).sum(-1)
        return np.where(np.isnan(factor), np.nan, values)

    def rows_at(self, values: Floats, factor: float) -> Floats:
        """Values [F, rows] at one strength [rows]."""
        mixed: Floats = weights(np.array(factor), self.factors) @ values
        return mixed

    def strength_of_kl(self, root: Floats, index: Ints) -> Floats:
        """Strength at which the root of the KL is so large [draws]; NaN beyond what was run."""
        return crossing(root, self.root_kl(index), self.factors)

    def peak_of(self, factor: float) -> float:
        """Largest strength of a step at a strength; NaN where the method's unit is another."""
        if self.peak is None:
            return float("nan")
        return float(self.at(self.peak[None], np.array([factor]))[0])

    def strength_of_peak(self, peak: float) -> float:
        """Strength at which the largest strength of a step is so large; NaN beyond what was run."""
        if self.peak is None:
            return float("nan")
        return float(crossing(np.array([peak]), self.peak[None], self.factors)[0])


def frontiers(records: Sequence[Record]) -> dict[tuple[str, str], Frontier]:
    """Frontiers by task and method, from the records of single attributes, sets and controls."""
    unsteered = next((record for record in records if record["method"] == "none"), None)
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["experiment"] != "orders" and record["method"] != "none":
            grouped.setdefault((record["task"], record["method"]), []).append(record)
    if unsteered is None:
        return {}
    return {
        key: _frontier(*key, unsteered, sorted(several, key=lambda one: float(one["factor"])))
        for key, several in grouped.items()
    }


def _frontier(task: str, method: str, unsteered: Record, steered: Sequence[Record]) -> Frontier:
    count = min(len(record["rows"]["nats"]) for record in (unsteered, *steered))
    targets = task.split(" + ")
    kinds = {kind(name) for name in targets}
    cells = [unsteered, *steered]
    others = [name for name in unsteered["rows"]["odds"] if kind(name) not in kinds]

    def values(name: str) -> Floats:
        return np.array([record["rows"][name][:count] for record in cells], dtype=float)

    def has(name: str) -> Floats:
        return np.array([[one == "1" for one in record["rows"]["has"][name][:count]] for record in cells], dtype=float)

    kl = None
    if all("kl" in record["rows"] for record in steered):
        known = min(len(record["rows"]["kl"]) for record in steered)
        kl = np.array([[0] * known, *(record["rows"]["kl"][:known] for record in steered)], dtype=float) / KL
    peaks = [record["peak"] for record in steered]
    changes = [np.abs(has(name).mean(1) - has(name)[0].mean()) for name in others]
    return Frontier(
        task=task,
        method=method,
        factors=np.array([0.0, *(record["factor"] for record in steered)], dtype=float),
        has=np.prod([has(name) for name in targets], axis=0),
        odds=np.mean([[record["rows"]["odds"][name][:count] for record in cells] for name in targets], axis=0) / ODDS,
        nats=values("nats") / NATS,
        bytes=values("bytes"),
        kl=kl,
        peak=None if None in peaks else np.array([0.0, *peaks], dtype=float),
        off_target=np.mean(changes, axis=0) if changes else np.zeros(len(cells)),
        distinct=values("distinct_2") / SHARES,
        self_bleu=np.array([record["self_bleu"] for record in cells], dtype=float),
    )
