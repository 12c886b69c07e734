"""As many as the model is sure of."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.choice import integer, number
from schedulers.order.selection import per_row
from schedulers.transfer.base import Quota, Transfer, finish


@dataclass(frozen=True)
class Threshold(Transfer):
    """As many as there are candidates of probability `value` or more, and at least `least`.

    Those are the very ones that commit under the order `confidence`; another order picks as many by its own score. A
    block goes on until it is full, whatever the number of steps. Source: Fast-dLLM's confidence-aware parallel decoding
    (arXiv 2505.22618).
    """

    value: float = 0.9
    """Above 0, up to 1."""
    pace: int | None = None
    """Positions to a step: no more commit by any step than that many for each step made, so that what the model was not
    sure of makes room for more later (Fast-dLLM's Dream loop without a cache); None: as many as it is sure of."""

    least: int = 1
    """Positions that commit at a step at least; LLaDA2.0's loop of N steps a block of 32 takes 32 / N."""

    needs: ClassVar[frozenset[str]] = frozenset({"probability"})
    binds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if number("value", self.value, 0, 1) == 0:
            raise ValueError("value must be above 0: 0 would commit everything at the first step")
        if self.pace is not None:
            integer("pace", self.pace, low=1)
        integer("least", self.least, low=1)

    def counts(self, quota: Quota) -> Tensor:
        """Number of candidates that are sure enough [R]."""
        if quota.probability is None:
            raise ValueError("transfer 'threshold' needs the candidates' probability, which was not computed")
        counts = per_row((quota.probability >= self.value).long(), quota.row, quota.step.shape[0])
        if self.pace is not None:
            counts = torch.minimum(counts, (quota.step + 1) * self.pace - (quota.total - quota.masked))
        return finish(counts.clamp(min=self.least), quota)
