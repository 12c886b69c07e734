"""Methods against each other: at equal quality, at equal measured KL, and at equal peak strength."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from bench.steering.frontier import Frontier
from bench.steering.statistics import Floats, halves, interval, resamples, row_parts, sign_flip

BOUNDS: Final = (1.10, 1.25)
BASELINE: Final = "uniform"
Found = dict[tuple[str, str], Frontier]


def equal_quality(found: Found, tasks: Sequence[str], methods: Sequence[str], bound: float) -> dict[str, Any]:
    """For each method the mean share over tasks within a loss ratio, its interval, and its lead over uniform.

    Each half of the rows is reported at the strength that the other half chose. Intervals resample the rows, and choose
    anew in every draw, so that they hold the luck of choosing too.
    """
    reached: dict[str, tuple[Floats, Floats, list[Floats]]] = {}
    for method in methods:
        several = [found[task, method] for task in tasks if (task, method) in found]
        if len(several) < len(tasks):
            continue
        cells = [cross_fit(one, bound) for one in several]
        reached[method] = (
            np.mean([share for share, _, _ in cells], axis=0),
            np.mean([ratio for _, ratio, _ in cells], axis=0),
            [rows for _, _, rows in cells],
        )
    return {
        method: {
            "share": float(share[0]),
            "interval": interval(share[1:]),
            "loss_ratio": float(ratio[0]),
            "rows": min(map(len, rows)),
        }
        | _lead(share, rows, reached.get(BASELINE), method)
        for method, (share, ratio, rows) in reached.items()
    }


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


def cross_fit(one: Frontier, bound: float) -> tuple[Floats, Floats, Floats]:
    """Share and loss ratio [draws], mean of both ways, and each row's share at the strength the other half chose."""
    even, odd = halves(one.has.shape[1])
    drawn_even, drawn_odd = even[resamples(len(even), seed=1)], odd[resamples(len(odd), seed=2)]
    first = one.best(bound, drawn_even, drawn_odd)
    second = one.best(bound, drawn_odd, drawn_even)
    rows = np.empty(one.has.shape[1])
    rows[odd] = one.rows_at(one.has, float(first[2][0]))[odd]
    rows[even] = one.rows_at(one.has, float(second[2][0]))[even]
    return (first[0] + second[0]) / 2, (first[1] + second[1]) / 2, rows


def _lead(
    share: Floats, rows: Sequence[Floats], baseline: tuple[Floats, Floats, list[Floats]] | None, method: str
) -> dict[str, Any]:
    if baseline is None or method == BASELINE:
        return {}
    # Of each task only the rows that both have.
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in zip(rows, baseline[2], strict=True)]
    return {
        "lead": float(share[0] - baseline[0][0]),
        "lead_interval": interval((share - baseline[0])[1:]),
        "p": sign_flip(row_parts([a - b for a, b in pairs])),
    }


def _matched(one: Frontier, baseline: Frontier, matched: str) -> Mapping[str, Any] | None:
    count = min(one.has.shape[1], baseline.has.shape[1])
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
