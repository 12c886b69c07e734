"""The surest token first."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.order.base import Candidates
from schedulers.order.sureness import Sureness


@dataclass(frozen=True)
class Confidence(Sureness):
    """The score is the probability of the candidate token.

    Source: LLaDA's low-confidence remasking (arXiv 2502.09992), which is Dream's MASKGIT_PLUS, after MaskGIT
    (arXiv 2202.04200).
    """

    measure: ClassVar[str] = "probability"

    def score(self, candidates: Candidates) -> Tensor:
        """The probability [N]."""
        return self.ranked(candidates.require(self.field), candidates)
