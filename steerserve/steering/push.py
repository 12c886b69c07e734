"""One direction at one layer for one row: the push, the gain that may change between steps, and what it did."""

import math
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from steerserve.steering.bounds import Bound
from steerserve.steering.encoders import Encoder, StateEncoder
from steerserve.steering.names import SCOPE_NAMES
from steerserve.steering.operators import READS_LATENT, READS_PAIR

SCOPES: Final[dict[str, int]] = {scope: place for place, scope in enumerate(SCOPE_NAMES)}


@dataclass
class Applied:
    """What a push did so far; the receipt is made from it."""

    positions: int = 0
    """Positions x steps at which the push changed the state."""
    steps: int = 0
    """Steps at which it touched at least one position."""
    ratio_sum: float = 0.0
    """Sum of |delta| / |h| over those positions."""
    ratio_max: float = 0.0
    clipped: int = 0
    """Positions x steps at which its bound, or that on what sets a latent, made it smaller."""
    missed: int = 0
    """Positions x steps at which it should have changed the state and did not: steering then does not take."""
    gains: list[float] = field(default_factory=list)
    """Gain at each step made."""

    def add(self, other: "Applied") -> None:
        """Count what an equal push did beside it, whose steps are none of its own: all but the gains."""
        self.positions += other.positions
        self.steps += other.steps
        self.ratio_sum += other.ratio_sum
        self.ratio_max = max(self.ratio_max, other.ratio_max)
        self.clipped += other.clipped
        self.missed += other.missed


@dataclass(eq=False)
class GainOverride:
    """What a run sets a push to between two steps."""

    gain: float | None = None
    """In place of its table's; None: the table's."""
    held: bool = True
    """False where it does not push at all."""

    def turn(self, gain: Tensor) -> Tensor:
        """The gain [] that holds where the table says `gain` []."""
        chosen = gain if self.gain is None else torch.full_like(gain, self.gain)
        return chosen if self.held else torch.zeros_like(gain)


@dataclass(eq=False)
class Push:
    """One direction at one layer for one row."""

    layer: int
    direction: Tensor
    """Unit vector [hidden_size]."""
    op: str
    strength: float
    """In hidden units, of a feature that is clamped or capped in units of its activation; or the factor of an operator
    that takes a pure number."""
    gains: Tensor
    """Gain per slice of progress [slices], float32."""
    scope: str | tuple[int, int] = "all"
    """A named scope, or a half-open span of canvas positions."""
    sae: Encoder | None = None
    """SAE of a push of a feature: then `clamp` and `cap` set its latent and not the projection."""
    feature: int | None = None
    pair: StateEncoder | None = None
    """The SAE's pair for the layer, of a `boost` where one is loaded: it then takes each token's largest activation
    from the SAE of its state."""
    within: tuple[float, float] = (0.0, math.inf)
    """The progress from which on the gains hold, and from which on there is none again."""
    override: GainOverride | None = None
    """Gain that replaces the one of its table, where it has one."""
    bound: Bound | None = None
    """The same for all the pushes of a row that have one."""
    applied: Applied = field(default_factory=Applied)

    @property
    def by_sae(self) -> bool:
        """Tell if its operator reads the state by an SAE."""
        return self.sae is not None and self.feature is not None and self.op in READS_LATENT

    @property
    def sets_latent(self) -> bool:
        """Tell if it is of a feature and sets its latent, so that its size is what the encoder needs for that."""
        return self.by_sae and self.op not in READS_PAIR

    @property
    def reads_latent(self) -> bool:
        """Tell if it is a reading of a feature: of its activation in the state as the pushes have left it."""
        return self.op == "read" and self.sae is not None and self.feature is not None

    @property
    def per_value(self) -> float:
        """Hidden units along its direction of 1 of what its operator reads."""
        if self.sae is None or self.feature is None or not self.by_sae:
            return 1.0
        return self.sae.row_norm(self.feature) if self.op == "boost" else self.sae.per_latent(self.feature)

    def gain_at(self, progress: float) -> Tensor:
        """The gain [] that its table has at a progress; a site looks up those of all its pushes at once."""
        slices = len(self.gains)
        gain = self.gains[min(int(progress * slices), slices - 1)]
        return gain if self.within[0] <= progress < self.within[1] else torch.zeros_like(gain)
