"""Intervals and tests over rows that share their noise: resampled rows are the same ones for every method."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DRAWS = 1000


def resamples(count: int, draws: int | None = None, seed: int = 0) -> Ints:
    """Rows drawn with replacement [1 + draws, count], DRAWS unless told otherwise; the first is the sample itself."""
    draws = DRAWS if draws is None else draws
    if count < 1:
        raise ValueError(f"there must be rows to draw from, got {count}")
    drawn = np.random.default_rng(seed).integers(0, count, size=(draws, count))
    return np.concatenate([np.arange(count)[None], drawn])


def halves(count: int) -> tuple[Ints, Ints]:
    """Even rows and odd rows: what is chosen on the one is reported on the other."""
    return np.arange(0, count, 2), np.arange(1, count, 2)


def interval(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a statistic's bootstrap draws; those that are not finite are left out."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def sign_flip(differences: Floats, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value that paired differences [rows] have mean 0, by flipping their signs at random.

    Source: Fisher's randomisation test for pairs; the sample counts as one of the draws, so that p is never 0.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(differences)))
    found = np.abs(signs @ differences) >= np.abs(differences.sum()) * (1 - 1e-9)
    return float((1 + found.sum()) / (1 + draws))


def row_parts(several: Sequence[Floats]) -> Floats:
    """Each row's part in the mean over tasks of the means over their rows, times the number of rows [longest].

    Tasks count alike however many rows they have, and the mean of the parts is that mean of means. Rows of one place
    share their noise, so a test that flips a row's sign flips it in every task.
    """
    longest = max(map(len, several))
    parts = np.zeros(longest)
    for values in several:
        parts[: len(values)] += values * (longest / len(values))
    return parts / len(several)


def weights(at: Floats, grid: Floats) -> Floats:
    """Linear interpolation as weights [..., grid] at values [...], the ends held beyond the grid, which rises."""
    place = np.clip(np.searchsorted(grid, at, side="right") - 1, 0, len(grid) - 2)
    share = np.clip((at - grid[place]) / (grid[place + 1] - grid[place]), 0.0, 1.0)
    found = np.zeros((*np.shape(at), len(grid)))
    np.put_along_axis(found, place[..., None], (1 - share)[..., None], axis=-1)
    np.put_along_axis(found, place[..., None] + 1, share[..., None], axis=-1)
    return found


def crossing(level: Floats, curve: Floats, grid: Floats) -> Floats:
    """Where on the grid each curve [draws, grid] first reaches its level [draws]; NaN where it never does.

    The curve is taken as its running maximum, linear between grid values.
    """
    rising = np.maximum.accumulate(curve, axis=1)
    found = np.full(len(curve), np.nan)
    for row, (one, wanted) in enumerate(zip(rising, np.broadcast_to(level, len(curve)), strict=True)):
        if one[0] <= wanted <= one[-1]:
            after = int(np.searchsorted(one, wanted, side="left"))
            if after == 0:
                found[row] = grid[0]
            else:
                share = (wanted - one[after - 1]) / (one[after] - one[after - 1])
                found[row] = grid[after - 1] + share * (grid[after] - grid[after - 1])
    return found


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; NaN for fewer than three points or where one side does not vary."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: Pearson's r of the ranks, ties sharing theirs."""
    from scipy.stats import rankdata

    return correlation(rankdata(x), rankdata(y))
