"""Summary of a run, worked out from its records alone."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from bench.steering.analysis.comparison import BOUNDS, Found, by_task, equal_cost, equal_quality, leads
from bench.steering.analysis.counts import count_texts
from bench.steering.analysis.directions import directions
from bench.steering.analysis.efficiency import efficiency
from bench.steering.analysis.frontier import Frontier, Record, frontiers
from bench.steering.analysis.interference import interference
from bench.steering.analysis.orders import orders
from bench.steering.analysis.statistics import interval, resamples
from bench.steering.plan.methods import METHODS, REFINED, SCHEDULES
from schedulers import CommitmentProfile

NORMS: Final = ("kl", "l2", "mean", "peak")


def summarise(
    records: Sequence[Record], profiles: Mapping[str, CommitmentProfile], header: Mapping[str, Any]
) -> dict[str, Any]:
    """The results as JSON: the run's header, and a section for each question."""
    found = frontiers(records)
    names = [name for name in METHODS if any(method == name for _, method in found)]
    sizes = {"single": 1, "pairs": 2, "triples": 3}
    tasks = {
        group: sorted({task for task, _ in found if len(task.split(" + ")) == size}) for group, size in sizes.items()
    }
    gains = {
        (record["task"], record["method"]): record["gains"][0]
        for record in records
        if record["experiment"] == "single" and len(record["gains"]) == 1 and record["gains"][0]
    }
    groups = {group: several for group, several in tasks.items() if several}
    return {
        **header,
        "texts": sum(len(record["rows"]["nats"]) for record in records),
        "counts": count_texts(records),
        "unsteered": _unsteered(records, tasks),
        "equal_quality": {
            group: {f"{bound:.2f}": equal_quality(found, several, names, bound) for bound in BOUNDS}
            for group, several in groups.items()
        },
        "equal_quality_by_task": {
            group: {f"{bound:.2f}": by_task(found, several, names, bound) for bound in BOUNDS}
            for group, several in groups.items()
        },
        **_refined(found, tasks["triples"], names),
        "equal_kl": {group: equal_cost(found, several, names, "kl") for group, several in groups.items()},
        "equal_peak": {group: equal_cost(found, several, names, "peak") for group, several in groups.items()},
        "at_own_strength": {group: _at_own_strength(found, several, names) for group, several in groups.items()},
        "directions": directions(found, tasks["single"]),
        "norms": _norms(found, tasks["single"], gains, profiles),
        "efficiency": efficiency(found, [name for name in names if name in SCHEDULES], gains, profiles),
        "interference": interference(records, {name: one["accuracy"] for name, one in header["classifiers"].items()}),
        "frontiers": [_points(one) for one in found.values()],
        "orders": orders(records),
    }


def _refined(found: Found, tasks: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What refinement is ahead of; nothing where nothing was refined."""
    refined, others = [one for one in names if one in REFINED], [one for one in names if one not in REFINED]
    if not refined:
        return {}
    return {"refined": {f"{bound:.2f}": leads(found, tasks, refined, others, bound) for bound in BOUNDS}}


def _unsteered(records: Sequence[Record], tasks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What texts have without steering."""
    record = next((one for one in records if one["method"] == "none"), None)
    if record is None:
        return {}
    rows = record["rows"]
    has = {name: np.array([one == "1" for one in marks]) for name, marks in rows["has"].items()}
    return {
        "texts": len(rows["nats"]),
        "nats_per_byte": sum(rows["nats"]) / 100 / sum(rows["bytes"]),
        "distinct_2": float(np.mean(rows["distinct_2"]) / 1000),
        "self_bleu": record["self_bleu"],
        "share": {
            task: float(np.all([has[name] for name in task.split(" + ")], axis=0).mean())
            for several in tasks.values()
            for task in several
        },
    }


def _at_own_strength(found: Found, tasks: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """Means over tasks at the strength of the grid that is nearest to the attributes' own."""
    told = {}
    for method in methods:
        several = [found[task, method] for task in tasks if (task, method) in found]
        if several:
            at = [int(np.abs(one.factors - 1).argmin()) for one in several]
            told[method] = {
                "factor": float(several[0].factors[at[0]]),
                "tasks": len(several),
                "share": float(np.mean([one.has[i].mean() for one, i in zip(several, at, strict=True)])),
                "shift": float(
                    np.mean([(one.odds[i] - one.odds[0]).mean() for one, i in zip(several, at, strict=True)])
                ),
                "loss_ratio": float(
                    np.mean(
                        [one.ratios(resamples(one.nats.shape[1], 0))[0, i] for one, i in zip(several, at, strict=True)]
                    )
                ),
                "distinct_2": float(np.mean([one.distinct_2[i] for one, i in zip(several, at, strict=True)])),
                "self_bleu": float(np.mean([one.self_bleu[i] for one, i in zip(several, at, strict=True)])),
                "off_target": float(np.mean([one.off_target[i] for one, i in zip(several, at, strict=True)])),
                "kl": _mean_kl(several, at),
            }
    return told


def _mean_kl(several: Sequence[Frontier], at: Sequence[int]) -> float | None:
    known = [float(one.kl[i].mean()) for one, i in zip(several, at, strict=True) if one.kl is not None]
    return float(np.mean(known)) if len(known) == len(several) else None


def _norms(
    found: Found,
    tasks: Sequence[str],
    gains: Mapping[tuple[str, str], Sequence[float]],
    profiles: Mapping[str, CommitmentProfile],
) -> dict[str, Any]:
    """The commitment schedule under each norm at the attribute's own strength.

    Norms of one schedule differ by a factor alone, so each is a point of the one frontier: the strength there, the
    share and the loss ratio, by interpolation. None beyond what was run.
    """
    told: dict[str, Any] = {}
    for task in tasks:
        if (task, "commitment") not in found or (task, "commitment") not in gains:
            continue
        one, applied = found[task, "commitment"], np.array(gains[task, "commitment"], dtype=float)
        cost = profiles[task].cost_on(len(applied))
        factors = {
            "l2": float(np.sqrt(len(applied) / (applied**2).sum())),
            "mean": float(len(applied) / applied.sum()),
            "peak": float(1 / applied.max()),
        }
        if cost is not None:
            factors["kl"] = float(np.sqrt(float(cost.sum()) / (cost.numpy() @ applied**2)))
        index = resamples(one.rows, 0)
        told[task] = {
            norm: {"factor": factors[norm]}
            | (
                {}
                if factors[norm] > one.factors[-1]
                else {
                    "share": float(one.at(one.shares(index), np.array([factors[norm]]))[0]),
                    "loss_ratio": float(one.at(one.ratios(index), np.array([factors[norm]]))[0]),
                }
            )
            for norm in NORMS
            if norm in factors
        }
    return told


def _points(one: Frontier) -> dict[str, Any]:
    """A frontier's grid points with intervals, for tables and figures."""
    index = resamples(one.rows, seed=3)
    share, ratio, shift = one.shares(index), one.ratios(index), one.shifts(index)
    return {
        "task": one.task,
        "method": one.method,
        "rows": one.rows,
        "factor": one.factors.tolist(),
        "share": _rounded(share[0]),
        "share_interval": [_rounded(interval(share[1:, i])) for i in range(len(one.factors))],
        "loss_ratio": _rounded(ratio[0]),
        "loss_ratio_interval": [_rounded(interval(ratio[1:, i])) for i in range(len(one.factors))],
        "shift": _rounded(shift[0]),
        "shift_interval": [_rounded(interval(shift[1:, i])) for i in range(len(one.factors))],
        "kl": None if one.kl is None else _rounded(one.kl.mean(1), 5),
        "peak": None if one.peak is None else _rounded(one.peak),
        "distinct_2": _rounded(one.distinct_2),
        "self_bleu": _rounded(one.self_bleu),
        "off_target": _rounded(one.off_target),
    }


def _rounded(values: Any, digits: int = 4) -> list[float]:
    return [round(float(value), digits) for value in values]
