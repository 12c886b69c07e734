"""The closed form against what is measured: how much further a schedule goes than the uniform push at equal KL.

To first order a push of strength a along gains g moves the log-odds by a sum s g and costs a^2 sum c g^2 / 2. At equal
KL a schedule so moves them (sum s g / sum s) sqrt(sum c / sum c g^2) times as far as the uniform push; for the best
schedule that is rho (arXiv 2605.10971, theorem 1). Measured are two ratios which agree where both laws hold: of the
shifts at equal root KL, and of the roots of the KL at equal shift, the other way up. The first tends to 1 where both
saturate; the second does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from bench.steering.analysis.frontier import Frontier
from bench.steering.analysis.statistics import Floats, correlation, interval, rank_correlation, resamples
from schedulers import CommitmentProfile
from schedulers.profile import coverage

LEVELS: Final = (0.4, 0.6, 0.8, 1.0)
"""Shares of the range that both methods reach at which they are compared."""
DRAWS: Final = 400
BASELINE: Final = "uniform"


def predicted_gain(gains: Sequence[float], profile: CommitmentProfile) -> float:
    """The closed form's factor of a schedule [K] over the uniform push at equal KL; NaN where that moves nothing.

    Sensitivity and cost are the measured ones; the curve's fractions and a constant where they were not measured.
    """
    slices = len(gains)
    share = coverage(slices, profile.slices)
    s = profile.sensitivity
    sensitivity = (
        (share @ torch.tensor(s, dtype=torch.float64)).numpy() if s is not None else profile.fractions(slices).numpy()
    )
    measured = profile.cost_on(slices)
    cost = np.ones(slices) if measured is None else measured.numpy()
    gain = np.asarray(gains, dtype=float)
    if sensitivity.sum() <= 0 or not gain.any():
        return float("nan")
    return float((sensitivity @ gain) / sensitivity.sum() * np.sqrt(cost.sum() / (cost @ gain**2)))


def measured_gain(one: Frontier, uniform: Frontier) -> dict[str, Any]:
    """Both ratios with their intervals, and their draws (the first is the sample's)."""
    count = min(one.rows, uniform.rows)
    index = resamples(count, DRAWS, seed=5)
    known = one.kl is not None and uniform.kl is not None
    drawn = resamples(min(_measured(one), _measured(uniform)) if known else 1, DRAWS, seed=6)
    mine, theirs = one.shifts(index), uniform.shifts(index)
    if known:
        my_root, their_root = one.root_kl(drawn), uniform.root_kl(drawn)
    else:
        my_root, their_root = (np.broadcast_to(f.factors, (len(index), len(f.factors))) for f in (one, uniform))
    shift = np.array([_ratio(*rows) for rows in zip(my_root, mine, their_root, theirs, strict=True)])
    root = np.array([_ratio(*rows) for rows in zip(theirs, their_root, mine, my_root, strict=True)])
    return {
        "cost": "measured" if known else "predicted",
        "shift_ratio": float(shift[0]),
        "shift_ratio_interval": interval(shift[1:]),
        "root_kl_ratio": float(root[0]),
        "root_kl_ratio_interval": interval(root[1:]),
        "draws": {"shift_ratio": shift, "root_kl_ratio": root},
    }


def efficiency(
    found: Mapping[tuple[str, str], Frontier],
    methods: Sequence[str],
    gains: Mapping[tuple[str, str], Sequence[float]],
    profiles: Mapping[str, CommitmentProfile],
) -> dict[str, Any]:
    """Predicted and measured gains of every attribute and method, and how they go together over attributes.

    gains: by task and method, as applied; a method of which they are not known before has no prediction.
    """
    points: list[dict[str, Any]] = []
    draws: list[dict[str, Floats]] = []
    for (task, method), one in found.items():
        if method == BASELINE or method not in methods or (task, BASELINE) not in found or task not in profiles:
            continue
        measured = measured_gain(one, found[task, BASELINE])
        draws.append(measured.pop("draws"))
        predicted = predicted_gain(gains[task, method], profiles[task]) if (task, method) in gains else float("nan")
        rho = profiles[task].efficiency()
        points.append({"task": task, "method": method, "predicted": predicted, "rho": rho, **measured})
    return {"points": points, "correlation": _correlations(points, draws)}


def _correlations(points: Sequence[Mapping[str, Any]], draws: Sequence[Mapping[str, Floats]]) -> dict[str, Any]:
    """Correlations of predicted and measured gain over attributes, for each method and for all points: Pearson's r of
    the logarithms and Spearman's of the gains. A gain of 0 or less has no logarithm and is left out of the first, in
    each draw anew; `points` of `of` are in it."""
    told: dict[str, Any] = {}
    for method in [*dict.fromkeys(point["method"] for point in points), "all"]:
        mine = [
            i
            for i, point in enumerate(points)
            if method in ("all", point["method"]) and np.isfinite(point["predicted"]) and point["predicted"] > 0
        ]
        if len(mine) < 3:
            continue
        predicted = np.array([points[i]["predicted"] for i in mine])
        for name in ("shift_ratio", "root_kl_ratio"):
            measured = np.array([draws[i][name] for i in mine])
            known, gained = np.isfinite(measured[:, 0]), measured > 0
            found = np.array(
                [
                    correlation(np.log(predicted[rows]).tolist(), np.log(column[rows]).tolist())
                    for column, rows in zip(measured.T, gained.T, strict=True)
                ]
            )
            told.setdefault(method, {})[name] = {
                "points": int(gained[:, 0].sum()),
                "of": len(mine),
                "pearson": float(found[0]),
                "pearson_interval": interval(found[1:]),
                "spearman": rank_correlation(predicted[known].tolist(), measured[known, 0].tolist()),
            }
    return told


def _measured(one: Frontier) -> int:
    return 0 if one.kl is None else one.kl.shape[1]


def _ratio(x: Floats, y: Floats, other_x: Floats, other_y: Floats) -> float:
    """y of one curve over y of the other, summed over levels of x that both reach; NaN where they share none."""
    x, other_x = np.maximum.accumulate(x), np.maximum.accumulate(other_x)
    reach = min(x[-1], other_x[-1])
    if not reach > 0:
        return float("nan")
    levels = reach * np.array(LEVELS)
    below = float(_at(levels, other_x, other_y).sum())
    return float(_at(levels, x, y).sum()) / below if below > 0 else float("nan")


def _at(levels: Floats, x: Floats, y: Floats) -> Floats:
    """Linear interpolation where x rises weakly: of equal values the first counts."""
    first = np.concatenate([[True], np.diff(x) > 0])
    found: Floats = np.interp(levels, x[first], y[first])
    return found
