"""Methods against each other: at equal quality, at equal measured KL, and at equal peak strength."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np

from bench.steering.analysis.frontier import Frontier
from bench.steering.analysis.statistics import Floats, halves, interval, resamples, row_parts, sign_flip

BOUNDS: Final = (1.10, 1.25)
BASELINE: Final = "uniform"
Found = dict[tuple[str, str], Frontier]
Fit = tuple[Floats, Floats, Floats]
"""Share and loss ratio [draws], and each row's share [rows]."""


def equal_quality(found: Found, tasks: Sequence[str], methods: Sequence[str], bound: float) -> dict[str, Any]:
    """For each method the mean share over tasks within a loss ratio, its interval, and its lead over uniform.

    Each half of the rows is reported at the strength that the other half chose. Intervals resample the rows, and choose
    anew in every draw, so that they hold the luck of choosing too. A share is of all rows of its method, a lead of the
    first rows that both have: where uniform has others too, it is not the difference of the two shares.
    """

    @cache
    def fitted(task: str, method: str, rows: int) -> Fit:
        return cross_fit(found[task, method].first(rows), bound)

    told: dict[str, Any] = {}
    for method in methods:
        if any((task, method) not in found for task in tasks):
            continue
        fits = [fitted(task, method, found[task, method].rows) for task in tasks]
        share = np.mean([one[0] for one in fits], axis=0)
        told[method] = {
            "share": float(share[0]),
            "interval": interval(share[1:]),
            "loss_ratio": float(np.mean([one[1][0] for one in fits])),
            "rows": min(len(one[2]) for one in fits),
        }
        if method != BASELINE and all((task, BASELINE) in found for task in tasks):
            counts = [min(found[task, one].rows for one in (method, BASELINE)) for task in tasks]
            mine, theirs = (
                [fitted(task, one, rows) for task, rows in zip(tasks, counts, strict=True)]
                for one in (method, BASELINE)
            )
            told[method] |= _lead(mine, theirs)
    return told


def leads(
    found: Found, tasks: Sequence[str], methods: Sequence[str], rivals: Sequence[str], bound: float
) -> dict[str, dict[str, Any]]:
    """How far each method is ahead of each rival at equal quality, on the first rows that both have of each task; those
    that were not run on every task are left out."""
    told: dict[str, dict[str, Any]] = {}
    for method in methods:
        for rival in rivals:
            if any((task, one) not in found for task in tasks for one in (method, rival)):
                continue
            counts = [min(found[task, one].rows for one in (method, rival)) for task in tasks]
            mine, theirs = (
                [cross_fit(found[task, one].first(rows), bound) for task, rows in zip(tasks, counts, strict=True)]
                for one in (method, rival)
            )
            told.setdefault(rival, {})[method] = _lead(mine, theirs) | {"rows": min(counts)}
    return told


def by_task(found: Found, tasks: Sequence[str], methods: Sequence[str], bound: float) -> dict[str, dict[str, Any]]:
    """The same for each task alone."""
    return {task: equal_quality(found, [task], methods, bound) for task in tasks}


def equal_cost(found: Found, tasks: Sequence[str], methods: Sequence[str], matched: str) -> dict[str, Any]:
    """Means over tasks at the KL (`kl`) or peak (`peak`) of the uniform push of the middle strength of its grid.

    A task is left out of a method's means where its grid does not reach that far; `tasks` says how many are in. Tasks
    count alike, however many rows each has.
    """
    told: dict[str, Any] = {}
    for method in methods:
        points = [
            point
            for task in tasks
            if (task, method) in found and (task, BASELINE) in found
            for point in [_matched(found[task, method], found[task, BASELINE], matched)]
            if point is not None
        ]
        if points:
            told[method] = {
                "tasks": len(points),
                **{name: float(np.mean([point[name][0] for point in points])) for name in points[0] if name != "rows"},
                "share_interval": interval(np.mean([point["share"] for point in points], axis=0)[1:]),
                "loss_ratio_interval": interval(np.mean([point["loss_ratio"] for point in points], axis=0)[1:]),
                "lead_interval": interval(np.mean([point["lead"] for point in points], axis=0)[1:]),
                "p": sign_flip(row_parts([point["rows"] for point in points])),
            }
    return told


def cross_fit(one: Frontier, bound: float) -> Fit:
    """Share and loss ratio [draws], mean of both ways, and each row's share at the strength the other half chose."""
    even, odd = halves(one.rows)
    drawn_even, drawn_odd = even[resamples(len(even), seed=1)], odd[resamples(len(odd), seed=2)]
    first = one.best(bound, drawn_even, drawn_odd)
    second = one.best(bound, drawn_odd, drawn_even)
    rows = np.empty(one.rows)
    rows[odd] = one.rows_at(one.has, float(first[2][0]))[odd]
    rows[even] = one.rows_at(one.has, float(second[2][0]))[even]
    return (first[0] + second[0]) / 2, (first[1] + second[1]) / 2, rows


def _lead(mine: Sequence[Fit], theirs: Sequence[Fit]) -> dict[str, Any]:
    """How far a method is ahead of the baseline, from fits of both on the same rows of each task."""
    both = list(zip(mine, theirs, strict=True))
    lead = np.mean([one[0] - other[0] for one, other in both], axis=0)
    return {
        "lead": float(lead[0]),
        "lead_interval": interval(lead[1:]),
        "p": sign_flip(row_parts([one[2] - other[2] for one, other in both])),
    }


def _matched(one: Frontier, baseline: Frontier, matched: str) -> Mapping[str, Any] | None:
    count = min(one.rows, baseline.rows)
    index = resamples(count, seed=3)
    middle = float(baseline.factors[1 + (len(baseline.factors) - 2) // 2])
    theirs = np.full(len(index), middle)
    if matched == "peak":
        mine = np.full(len(index), one.strength_of_peak(baseline.peak_of(middle)))
    else:
        if (one.kl is None) != (baseline.kl is None):
            return None
        measured = 1 if one.kl is None or baseline.kl is None else min(one.kl.shape[1], baseline.kl.shape[1])
        drawn = resamples(measured, seed=4)
        mine = one.strength_of_kl(baseline.at(baseline.root_kl(drawn), theirs), drawn)
    if np.isnan(mine[0]):
        return None
    share = one.at(one.shares(index), mine)
    at = np.array([mine[0]])
    return {
        "strength": mine,
        "share": share,
        "lead": share - baseline.at(baseline.shares(index), theirs),
        "shift": one.at(one.shifts(index), mine),
        "loss_ratio": one.at(one.ratios(index), mine),
        "off_target": one.at(one.off_target[None], at),
        "distinct_2": one.at(one.distinct_2[None], at),
        "self_bleu": one.at(one.self_bleu[None], at),
        "rows": one.rows_at(one.has, float(mine[0]))[:count] - baseline.rows_at(baseline.has, middle)[:count],
    }
