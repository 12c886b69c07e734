"""The least uncertain position first."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.order.base import Candidates
from schedulers.order.sureness import Sureness


@dataclass(frozen=True)
class Entropy(Sureness):
    """The score is minus the entropy of the position's distribution. Source: Dream's ENTROPY."""

    measure: ClassVar[str] = "entropy"

    def score(self, candidates: Candidates) -> Tensor:
        """Minus the entropy [N], nats."""
        return self.ranked(-candidates.require(self.field), candidates)
