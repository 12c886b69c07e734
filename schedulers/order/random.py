"""Random order."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.order.base import Candidates


@dataclass(frozen=True)
class Random:
    """Positions commit in a random order: the score is a uniform draw.

    Source: LLaDA's `remasking="random"` (arXiv 2502.09992); Dream's ORIGIN is the same order, but lets each mask
    commit by an independent draw, where here the transfer says how many do.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"uniform"})

    def score(self, candidates: Candidates) -> Tensor:
        """The draw [N]."""
        return candidates.require("uniform")
