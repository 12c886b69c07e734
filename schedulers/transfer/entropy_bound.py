"""As many as may be drawn independently at a bounded loss."""

from dataclasses import dataclass
from typing import ClassVar, Final

from torch import Tensor

from schedulers.choice import number
from schedulers.order.selection import per_row
from schedulers.transfer.base import Quota, Transfer, finish

NAT: Final = 2**32
"""Entropies are summed as integers of this many to the nat: exactly, so never by the layout of the batch."""


@dataclass(frozen=True)
class EntropyBound(Transfer):
    """The most of the best candidates whose entropies sum to at most `value` nats beyond their largest, at least one.

    The sum bounds what is lost by sampling them independently. A block goes on until it is full, whatever the number of
    steps. Source: EB-Sampler (arXiv 2505.24857).
    """

    value: float = 0.1
    """Nats, 0 or more."""

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    binds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("value", self.value, 0, 1e6)

    def counts(self, quota: Quota) -> Tensor:
        """The longest run of best candidates within the bound [R]."""
        if quota.entropy is None:
            raise ValueError("transfer 'entropy_bound' needs the candidates' entropy, which was not computed")
        rows = quota.step.shape[0]
        entropy = (quota.entropy.double() * NAT).round().long()
        row_sums = per_row(entropy, quota.row, rows)
        summed = entropy.cumsum(0) - (row_sums.cumsum(0) - row_sums)[quota.row]
        # No entropy reaches 2^44 / NAT = 4096 nats, so a row's running maximum never comes from the row before.
        lifted = quota.row * 2**44
        largest = (entropy + lifted).cummax(0).values - lifted
        fits = (summed - largest <= round(self.value * NAT)).long()
        # What is summed beyond the largest never falls along a row: the candidates that fit are its first ones.
        counts = per_row(fits, quota.row, rows)
        return finish(counts.clamp(min=1), quota)
