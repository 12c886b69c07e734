"""The SAE direction against the difference of means, attribute by attribute, with the controls beside them."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from bench.steering.analysis.comparison import Found, cross_fit
from bench.steering.analysis.statistics import interval, resamples, sign_flip

SCHEDULES: Final = ("uniform", "commitment")
CONTROLS: Final = ("random direction", "sign flipped", "matched norm")
BOUND: Final = 1.10


def directions(found: Found, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each attribute: both directions' share at equal quality and the SAE's lead, by schedule; each control's shift
    of the log-odds at the attribute's own strength, beside that of the push it stands for. What is beside each other is
    of the same texts: the first rows that all have."""
    told: dict[str, dict[str, Any]] = {}
    for task in tasks:
        one: dict[str, Any] = {}
        for schedule in SCHEDULES:
            mine, theirs = found.get((task, schedule)), found.get((task, f"difference of means, {schedule}"))
            if mine is not None and theirs is not None:
                rows = min(mine.rows, theirs.rows)
                sae, means = cross_fit(mine.first(rows), BOUND), cross_fit(theirs.first(rows), BOUND)
                one[schedule] = {
                    "sae": float(sae[0][0]),
                    "diff_means": float(means[0][0]),
                    "lead": float(sae[0][0] - means[0][0]),
                    "lead_interval": interval((sae[0] - means[0])[1:]),
                    "p": sign_flip(sae[2] - means[2]),
                }
        several = {name: found[task, name] for name in ("commitment", *CONTROLS) if (task, name) in found}
        for name, frontier in several.items():
            index = resamples(min(other.rows for other in several.values()), seed=3)
            shifts = frontier.shifts(index)
            at = int(np.abs(frontier.factors - 1).argmin())
            one.setdefault("shift", {})[name] = [float(shifts[0, at]), *interval(shifts[1:, at])]
        if one:
            told[task] = one
    return told
