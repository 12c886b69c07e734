"""Choose the layers to push: the share of texts that each set reaches at one measured KL, and the loss of these texts.

At one strength layers differ in what they do and in what they cost alike, so a comparison at one strength mostly tells
which layer is pushed hardest. Here every layer set is pushed as hard as brings the measured trajectory KL to one value.
Source: ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.calibrate.trials.strength import Evaluate, Setting, Trial, merit

ROUNDS: Final = 3
"""Trials of each layer set, at most, in which its strength is found."""
NEAR: Final = 0.1
"""Part of the KL by which a strength may miss it and is left as it is."""
LEVEL: Final = 0.3
"""Part of the KL by which fresh texts may miss it and still be compared."""
LEAP: Final = 4.0
"""Factor by which a strength is changed at once, at most."""
EXPONENTS: Final = (0.5, 4.0)
"""Within which the KL is taken to grow with strength; 2 for small pushes."""


@dataclass(frozen=True)
class Comparison:
    """Layer sets at one measured KL, on fresh texts."""

    kl: float
    """Nats a response token that were aimed at."""
    reached: tuple[Trial, ...]
    layers: tuple[int, ...]
    """The set that was chosen."""
    note: str | None

    def level(self, trial: Trial) -> bool:
        """Tell if a trial's KL is near enough to be compared."""
        return trial.kl is not None and abs(trial.kl / self.kl - 1) <= LEVEL

    def to_json(self) -> dict[str, Any]:
        """JSON values, for provenance."""
        rows = [trial.to_json() | {"level": self.level(trial)} for trial in self.reached]
        return {"kl": self.kl, "reached": rows, "chosen": list(self.layers), "note": self.note}

    def table(self, name: str) -> str:
        """Lines of columns, the chosen set marked."""
        head = f"{'layers':>12} {'strength':>8} {'KL':>7} {'share':>6} {'loss ratio':>10} {'distinct':>8}"
        lines = [f"{name}: layers at {self.kl:g} measured nats a response token", head]
        for trial in self.reached:
            place = ", ".join(map(str, trial.setting.layers))
            mark = " chosen" if trial.setting.layers == self.layers else "" if self.level(trial) else " another KL"
            lines.append(
                f"{place:>12} {trial.setting.strength:>8.3f} {trial.kl or 0.0:>7.3f} {100 * trial.share:>4.0f} % "
                f"{trial.loss_ratio:>10.3f} {trial.distinct_ratio:>8.3f}{mark}"
            )
        return "\n".join(lines if self.note is None else [*lines, self.note])


def compare(
    layer_sets: Sequence[tuple[int, ...]], kl: float, start: float, evaluate: Evaluate, enough: float
) -> Comparison:
    """Bring every layer set to one measured KL, from the strength `start` on, and choose the best on fresh texts.

    `evaluate` must measure the KL. The winner is that of `merit` among the sets whose KL on fresh texts is level; where
    none is, among all, and a note says so.
    """
    strengths = dict.fromkeys(layer_sets, start)
    tried: dict[tuple[int, ...], list[tuple[float, float]]] = {layers: [] for layers in layer_sets}
    for _ in range(ROUNDS):
        due = [layers for layers in layer_sets if not tried[layers] or _misses(tried[layers][-1][1], kl)]
        if not due:
            break
        for trial in evaluate([Setting(layers, strengths[layers]) for layers in due], False):
            layers = trial.setting.layers
            tried[layers].append((trial.setting.strength, trial.kl or 0.0))
            strengths[layers] = float(f"{next_strength(tried[layers], kl):.4g}")
    found = evaluate([Setting(layers, strengths[layers]) for layers in layer_sets], True)
    comparison = Comparison(kl, tuple(found), (), None)
    level = [trial for trial in found if comparison.level(trial)]
    best = max(level or found, key=lambda trial: merit(trial, enough))
    note = None if level else f"no layers came within {LEVEL:.0%} of the KL: they were compared as they are"
    return Comparison(kl, tuple(found), best.setting.layers, note)


def next_strength(tried: Sequence[tuple[float, float]], kl: float) -> float:
    """The strength at which the last two of (strength, KL) tried, joined by a power law, reach the KL; the last itself
    where it is near. Of a single one the KL grows with the square."""
    strength, last = tried[-1]
    if not _misses(last, kl):
        return strength
    exponent = 2.0
    if len(tried) > 1:
        before, first = tried[-2]
        if first > 0 and last > 0 and before != strength:
            exponent = math.log(last / first) / math.log(strength / before)
    low, high = EXPONENTS
    ratio = LEAP if last <= 0 else (kl / last) ** (1 / min(max(exponent, low), high))
    return strength * min(max(ratio, 1 / LEAP), LEAP)


def site_forwards(sets: int, recipe: CalibrationRecipe) -> int:
    """Forward passes of one row that a comparison takes at most; measuring the KL takes a second row."""
    return 2 * sets * (ROUNDS * recipe.search_texts + recipe.confirm_texts) * recipe.trial_steps


def _misses(found: float, kl: float) -> bool:
    return abs(found / kl - 1) > NEAR
