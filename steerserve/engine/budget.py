"""What a row may still spend of the predicted KL that it is limited to."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

from steerserve.engine.cost import Bill
from steerserve.steering.push import Push

ROUNDING = 1 + 1e-9
"""By how much a sum may be over a limit and still be at it."""


@dataclass(eq=False)
class PredictedBudget:
    """Kept while a row runs: charged with what each forward committed, under the gains that it had."""

    limit: float
    """Nats a response token."""
    refuses: bool
    """Whether the row ends where it is over the limit; else its gains are lowered before that."""
    bill: Bill | None
    """Of the row's own pushes; None where there are none."""
    groups: tuple[tuple[Push, ...], ...]
    """Pushes of each intervention of the bill."""
    planned: tuple[float, ...] | None
    """Progress before each forward; None where it depends on draws or on the model."""
    spent: float = 0.0
    cut: int = 0
    """Forwards whose gains were lowered."""
    rate: float = 0.0
    """Nats that each token costs which the last forward commits."""
    lowered: bool = False
    """Whether the gains of the last forward were lowered."""

    @property
    def exceeded(self) -> bool:
        return self.spent > self.limit * ROUNDING

    def factor(self, progress: float, masked: float, gains: list[float]) -> float:
        """By how much the gains of a forward at this progress are to be multiplied, 1 or less, so that the limit holds
        whatever it commits; masked: share of the response that may commit at it.

        Where the forwards are planned it commits its planned share, else it may commit all of that."""
        self.lowered = False
        if self.bill is None:
            self.rate = 0.0
            return 1.0
        at = torch.tensor([progress], dtype=torch.float64)
        _, together = self.bill.rates(at, torch.tensor([gains], dtype=torch.float64))
        self.rate = float(together)
        left = max(0.0, self.limit - self.spent)
        due = self.rate * self._share(progress, masked)
        # Where nothing is due there is nothing to lower, also where a change has left less than was spent.
        if self.refuses or due <= 0 or self.spent + due <= self.limit * ROUNDING:
            return 1.0
        self.lowered = True
        self.rate *= left / due
        return math.sqrt(left / due)

    def charge(self, share: float) -> None:
        """Count the last forward, and the share of the response that it committed."""
        self.cut += self.lowered
        self.spent += self.rate * share

    def after(self, earlier: "PredictedBudget") -> "PredictedBudget":
        """The same with what a budget that it takes the place of has spent."""
        return replace(self, spent=self.spent + earlier.spent, cut=self.cut + earlier.cut)

    def _share(self, progress: float, masked: float) -> float:
        if self.planned is None:
            return masked
        here = bisect_right(self.planned, progress) - 1
        following = self.planned[here + 1] if here + 1 < len(self.planned) else 1.0
        return following - min(progress, self.planned[max(here, 0)])
