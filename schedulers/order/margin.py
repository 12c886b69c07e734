"""The clearest choice first."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.order.base import Candidates
from schedulers.order.sureness import Sureness


@dataclass(frozen=True)
class Margin(Sureness):
    """The score is p1 - p2, the probabilities of the two likeliest tokens. Source: Dream's TOPK_MARGIN."""

    measure: ClassVar[str] = "margin"

    def score(self, candidates: Candidates) -> Tensor:
        """The margin [N]."""
        return self.ranked(candidates.require(self.field), candidates)
