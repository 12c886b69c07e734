"""Intervals around measured shares and ratios."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054


def wilson(successes: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share, 95 % unless told otherwise. Source: Wilson 1927. Raises ValueError for no trials."""
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"successes must be 0 to count, and count 1 or more, got {successes} of {count}")
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], seed: int = 0, draws: int = 4000
) -> tuple[float, float]:
    """95 % percentile interval of mean(above) / mean(below), drawn in pairs: above[i] and below[i] share noise."""
    if len(above) != len(below) or not above:
        raise ValueError(f"pairs must be of one length, 1 or more, got {len(above)} and {len(below)}")
    pairs = np.stack([np.asarray(above, dtype=float), np.asarray(below, dtype=float)])
    index = np.random.default_rng(seed).integers(0, len(above), size=(draws, len(above)))
    means = pairs[:, index].mean(axis=2)
    low, high = np.percentile(means[0] / means[1], [2.5, 97.5])
    return float(low), float(high)
