"""As many as the model is sure of."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.choice import number
from schedulers.order.selection import per_row
from schedulers.transfer.base import Quota, Transfer, finish


@dataclass(frozen=True)
class Threshold(Transfer):
    """As many as there are candidates of probability `value` or more, and at least one.

    Those are the very ones that commit under the order `confidence`; another order picks as many by its own score.
    Source: Fast-dLLM's confidence-aware parallel decoding (arXiv 2505.22618).
    """

    value: float = 0.9
    """Above 0, up to 1."""

    needs: ClassVar[frozenset[str]] = frozenset({"probability"})

    def __post_init__(self) -> None:
        if number("value", self.value, 0, 1) == 0:
            raise ValueError("value must be above 0: 0 would commit everything at the first step")

    def counts(self, quota: Quota) -> Tensor:
        """How many are sure enough [R]."""
        if quota.probability is None:
            raise ValueError("transfer 'threshold' needs the candidates' probability, which was not computed")
        sure = (quota.probability >= self.value).long()
        return finish(per_row(sure, quota.row, quota.step.shape[0]).clamp(min=1), quota)
