"""Search for the layers and the strength that steer best at bounded cost in quality."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerserve.calibrate.recipes import CalibrationRecipe


@dataclass(frozen=True)
class Setting:
    """The layers and the strength of one trial."""

    layers: tuple[int, ...]
    strength: float
    """Applied at each of the layers."""


@dataclass(frozen=True)
class Trial:
    """Result of one trial."""

    setting: Setting
    texts: int
    share: float
    """Share of texts assigned to the target."""
    probability: float
    """Mean probability of the target."""
    loss_ratio: float
    """Mean loss under the unsteered model, over that of unsteered texts from the same noise."""
    distinct_ratio: float
    """Mean distinct-2 of a text, over that of the same unsteered texts."""
    within: bool
    """True if both ratios are inside the recipe's bounds."""
    kl: float | None = None
    """Measured KL of the steered from the unsteered predictions in nats a response token; None: not measured."""

    def to_json(self) -> dict[str, Any]:
        """A flat dict of JSON values."""
        raw = asdict(self)
        setting = raw.pop("setting")
        rounded = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in raw.items()
            if value is not None
        }
        return {"layers": list(setting["layers"]), "strength": setting["strength"], **rounded}


@dataclass(frozen=True)
class Choice:
    """The setting that won, and everything that was tried."""

    setting: Setting
    searched: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    note: str | None

    def to_json(self) -> dict[str, Any]:
        """JSON values, for provenance."""
        return {
            "searched": [trial.to_json() for trial in self.searched],
            "confirmed": [trial.to_json() for trial in self.confirmed],
            "note": self.note,
        }


Evaluate = Callable[[Sequence[Setting], bool], list[Trial]]
"""Runs some settings at once; the flag says whether on the fresh texts of the confirmation."""


def search(
    layer_sets: Sequence[tuple[int, ...]],
    strengths: Sequence[float],
    evaluate: Evaluate,
    enough: float,
    finalists: int = 3,
) -> Choice:
    """Bisect each layer set's strength for the weakest whose share is `enough`, or else the strongest within bounds;
    of all tried, run the best again and choose.

    Share rises and quality falls with strength, so a grid of 7 strengths takes 3 trials a layer set. Runs on fresh
    texts guard against choosing what was lucky. The winner has the largest share within bounds, and among those with
    enough the lowest loss; where nothing keeps the bounds, it is the one with the lowest loss, and a note says so.
    """
    # Borders of what is not known yet: `low` is too weak, `high` strong enough or too strong.
    borders = {layers: (-1, len(strengths)) for layers in layer_sets}
    searched: list[Trial] = []
    while open_sets := [layers for layers, (low, high) in borders.items() if high - low > 1]:
        middles = {layers: sum(borders[layers]) // 2 for layers in open_sets}
        trials = evaluate([Setting(layers, strengths[middle]) for layers, middle in middles.items()], False)
        for trial, (layers, middle) in zip(trials, middles.items(), strict=True):
            low, high = borders[layers]
            borders[layers] = (middle, high) if trial.within and trial.share < enough else (low, middle)
        searched += trials
    ranked = sorted(searched, key=lambda trial: merit(trial, enough), reverse=True)
    confirmed = evaluate([trial.setting for trial in ranked[:finalists]], True)
    best = max(confirmed, key=lambda trial: merit(trial, enough))
    note = None if best.within else "no trial kept within the bounds of quality: the one of lowest loss was taken"
    return Choice(best.setting, tuple(searched), tuple(confirmed), note)


def merit(trial: Trial, enough: float) -> tuple[bool, float, float]:
    """Sort key of trials: within bounds the share, from `enough` on the lower loss; without, the lower loss."""
    if not trial.within:
        return False, -trial.loss_ratio, 0.0
    if trial.share < enough:
        return True, trial.share, trial.probability
    return True, enough, 1.0 - trial.loss_ratio


def layer_sets(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Each layer alone, and all of them together."""
    alone: list[tuple[int, ...]] = [(layer,) for layer in sorted(layers)]
    return alone if len(alone) == 1 else [*alone, tuple(sorted(layers))]


def forwards(sets: int, recipe: CalibrationRecipe) -> int:
    """Forward passes of one row of one attribute's search, its texts only."""
    rounds = len(recipe.strengths).bit_length()
    return (sets * rounds * recipe.search_texts + 3 * recipe.confirm_texts) * recipe.trial_steps
