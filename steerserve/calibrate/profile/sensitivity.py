"""Sensitivity of a text to pushes over progress: pairs of runs with common random numbers that differ by one pulse.

    s(window) = mean over pairs of (log-odds of the target after the pulse - without it) / strength of the pulse

the log-odds being those of the final text under the attribute's classifier. The unsteered run of a pair draws the same
noise, and is common to all pulses, whose errors are therefore correlated; their covariance over pairs is kept. Within a
window s is taken to be spread evenly. Source: ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CLIP = 1e-6
"""Probabilities are kept this far from 0 and 1, so that log-odds are finite."""
UNSURE = "the pulses' effects add up to no more than twice their error: neither rho nor a schedule can be trusted"


@dataclass(frozen=True, eq=False)
class Effects:
    """Change of the final log-odds per unit strength, by pair."""

    windows: Floats
    """[pairs, W]: a pulse in each window."""
    uniform: Floats
    """[pairs]: the uniform push."""

    @property
    def means(self) -> Floats:
        """[W]."""
        found: Floats = self.windows.mean(0)
        return found

    @property
    def covariance(self) -> Floats:
        """[W, W] of the means."""
        found: Floats = np.atleast_2d(np.cov(self.windows, rowvar=False)) / len(self.windows)
        return found

    @property
    def errors(self) -> Floats:
        """[W] standard errors of the means."""
        found: Floats = np.sqrt(self.covariance.diagonal())
        return found

    def additivity(self) -> dict[str, float | None]:
        """Sum of the pulses' effects over the effect of the uniform push, which is the sum where steps add up.

        The standard error is that of a ratio of paired means (delta method); None where the uniform push did nothing.
        """
        sums = self.windows.sum(1)
        whole, count = float(self.uniform.mean()), len(sums)
        found: dict[str, float | None] = {
            "sum": round(float(sums.mean()), 4),
            "sum_error": round(float(sums.std(ddof=1)) / math.sqrt(count), 4),
            "uniform": round(whole, 4),
            "uniform_error": round(float(self.uniform.std(ddof=1)) / math.sqrt(count), 4),
            "ratio": None,
            "ratio_error": None,
        }
        if whole:
            ratio = float(sums.mean()) / whole
            found["ratio"] = round(ratio, 4)
            error = (sums - ratio * self.uniform).std(ddof=1) / math.sqrt(count) / abs(whole)
            found["ratio_error"] = round(float(error), 4)
        return found


@dataclass(frozen=True, eq=False)
class ShrunkSensitivity:
    """Sensitivities of the windows with the noise of their measurement taken into account."""

    values: Floats
    """[W]: s, after each s / c was pulled towards their mean by the share of its variance that is noise."""
    factors: Floats
    """[W]: what is left of each deviation, 0 to 1."""
    rho: dict[str, float | None]
    """`raw` from s as measured, which noise inflates; `corrected` with the expected noise subtracted from the
    dispersion; `shrunk` from the values."""


def log_odds(probabilities: Sequence[float] | Floats) -> Floats:
    """log(p / (1 - p)), p kept CLIP away from 0 and 1."""
    p = np.clip(np.asarray(probabilities, dtype=float), CLIP, 1 - CLIP)
    found: Floats = np.log(p / (1 - p))
    return found


def shrink(means: Floats, covariance: Floats, cost: Floats) -> ShrunkSensitivity:
    """Empirical-Bayes sensitivities; means [W] and covariance [W, W] as measured, cost [W] of a unit pulse.

    With x = s / c and weights pi = c / sum c, the dispersion that rho is made of is D = sum pi (x - m)^2, m = sum pi x.
    Noise of covariance V of x adds tr(diag(pi) V) - pi^T V pi to it on average; what is left, at least 0, estimates the
    true variance t of x. Then x_w is pulled to m + t / (t + V_ww) (x_w - m): the best linear guess from x_w alone if m
    were known and not itself made of the windows; where t + V_ww is 0 it stays. m is what the uniform push does over
    what it costs; as windows are pulled by different shares, the mean of the pulled ones may lie beside it, and so may
    the sum of the values beside that of the means.
    """
    x, weights = means / cost, cost / cost.sum()
    noise = covariance / np.outer(cost, cost)
    mean = float(weights @ x)
    dispersion = float(weights @ (x - mean) ** 2)
    added = float(weights @ noise.diagonal() - weights @ noise @ weights)
    true = max(0.0, dispersion - added)
    bottom = true + noise.diagonal()
    factors = np.where(bottom > 0, true / np.where(bottom > 0, bottom, 1.0), 1.0)
    pulled = mean + factors * (x - mean)
    centre = float(weights @ pulled)
    rho = {
        "raw": _rho(dispersion, mean),
        "corrected": _rho(true, mean),
        "shrunk": _rho(float(weights @ (pulled - centre) ** 2), centre),
    }
    return ShrunkSensitivity(pulled * cost, factors, rho)


def _rho(dispersion: float, mean: float) -> float | None:
    """sqrt(1 + CV^2) of a variance and a mean; None where the mean is 0."""
    return round(math.sqrt(1 + dispersion / mean**2), 4) if mean else None


def spread(values: Sequence[float] | Floats, windows: Sequence[tuple[int, int]]) -> list[float]:
    """Values [W] of windows shared out evenly among their slices [K], so that each window's sum is its value.

    Standard errors are shared out alike: those of one window's slices are wholly correlated.
    """
    return [
        float(value) / (stop - start)
        for value, (start, stop) in zip(values, windows, strict=True)
        for _ in range(start, stop)
    ]


def summary(effects: Effects, shrunk: ShrunkSensitivity, windows: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Sensitivities as provenance records them."""
    mean = effects.windows.sum(1)
    error = float(mean.std(ddof=1)) / math.sqrt(len(mean))
    return {
        "windows": [list(window) for window in windows],
        "raw": [round(float(value), 6) for value in effects.means],
        "errors": [round(float(value), 6) for value in effects.errors],
        "stored": [round(float(value), 6) for value in shrunk.values],
        "factors": [round(float(value), 4) for value in shrunk.factors],
        "pairs": len(mean),
        "additivity": effects.additivity(),
        "rho": shrunk.rho,
        "note": None if abs(float(mean.mean())) > 2 * error else UNSURE,
    }
