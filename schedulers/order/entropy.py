"""The least uncertain position first."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.order.base import Candidates


@dataclass(frozen=True)
class Entropy:
    """The score is minus the entropy of the position's distribution. Source: Dream's ENTROPY."""

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def score(self, candidates: Candidates) -> Tensor:
        """Minus the entropy [N], nats."""
        return -candidates.require("entropy")
