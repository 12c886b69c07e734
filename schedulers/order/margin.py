"""The clearest choice first."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.order.base import Candidates


@dataclass(frozen=True)
class Margin:
    """The score is p1 - p2, the probabilities of the two likeliest tokens. Source: Dream's TOPK_MARGIN."""

    needs: ClassVar[frozenset[str]] = frozenset({"margin"})

    def score(self, candidates: Candidates) -> Tensor:
        """The margin [N]."""
        return candidates.require("margin")
