"""How many masked positions commit at a step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor

from schedulers.choice import Choice, build, number
from schedulers.order.selection import per_row

NAT: Final = 2**32
"""Entropies are summed as integers of this many to the nat: exactly, so never by the layout of the batch."""


@dataclass(frozen=True, eq=False)
class Quota:
    """Where each of R rows stands in its block, and its candidates, best first within rows (`rank`), N in all."""

    step: Tensor
    """[R] int64, this step of the block, from 0."""
    steps: Tensor
    """[R] int64, steps of the block."""
    total: Tensor
    """[R] int64, positions masked when the block began."""
    masked: Tensor
    """[R] int64, positions masked now."""
    row: Tensor
    """[N] int64, 0 to R - 1, sorted."""
    probability: Tensor | None = None
    """[N] float32, of each candidate token."""
    entropy: Tensor | None = None
    """[N] float32, nats."""


class Transfer(Protocol):
    """Says how many positions of each row commit. A frozen, hashable config."""

    needs: ClassVar[frozenset[str]]
    """Names of the fields of Candidates that `counts` reads."""

    def counts(self, quota: Quota) -> Tensor:
        """How many commit [R] int64, 0 to `masked`; by a block's last step as many in all as it has positions."""
        ...

    def masked(self, total: int, steps: int) -> list[int] | None:
        """Masked positions before each step of a block of `total`, as far as there are any; None where it is not
        known beforehand, because it depends on what the model says."""
        ...


@dataclass(frozen=True)
class Linear:
    """As many at every step: total // steps, and one more at the first total % steps steps.

    Unlike the others it does not take all that is left at the last step: a model that draws its own mask token leaves
    the position masked, as the published loop does. Source: LLaDA's `get_num_transfer_tokens` (arXiv 2502.09992).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def counts(self, quota: Quota) -> Tensor:
        """The share of this step [R]."""
        each, more = quota.total // quota.steps, quota.total % quota.steps
        return torch.minimum(each + (quota.step < more), quota.masked)

    def masked(self, total: int, steps: int) -> list[int] | None:
        """See `Transfer.masked`."""
        each, more = divmod(total, steps)
        return [total - each * i - min(i, more) for i in range(steps if each else more)]


@dataclass(frozen=True)
class Cosine:
    """Few at first, more later: after step i of T, from 0, ceil(total cos(pi/2 (i + 1) / T)) are still masked.

    Source: MaskGIT's cosine masking schedule (arXiv 2202.04200). With about as many steps as positions the first
    steps commit nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def counts(self, quota: Quota) -> Tensor:
        """What is masked beyond the schedule [R]."""
        left = self._left(quota.total, quota.step, quota.steps)
        return _finish((quota.masked - left).clamp(min=0), quota)

    def masked(self, total: int, steps: int) -> list[int] | None:
        """See `Transfer.masked`."""
        step = torch.arange(steps - 1)
        left = self._left(torch.tensor(total), step, torch.tensor(steps))
        return [total, *(count for count in left.tolist() if count > 0)]

    @staticmethod
    def _left(total: Tensor, step: Tensor, steps: Tensor) -> Tensor:
        share = torch.cos(math.pi / 2 * (step + 1).double() / steps)
        # cos(pi / 3) comes out above 1/2: what is a whole number but for rounding is that number.
        return (total * share - 1e-9).ceil().long()


@dataclass(frozen=True)
class Threshold:
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
        return _finish(per_row(sure, quota.row, quota.step.shape[0]).clamp(min=1), quota)

    def masked(self, total: int, steps: int) -> list[int] | None:  # noqa: ARG002 (the contract's)
        """See `Transfer.masked`."""
        return None


@dataclass(frozen=True)
class EntropyBound:
    """The most of the best candidates whose entropies sum to at most `value` nats beyond their largest, at least one.

    The sum bounds what is lost by sampling them independently. Source: EB-Sampler (arXiv 2505.24857).
    """

    value: float = 0.1
    """Nats, 0 or more."""

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

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
        return _finish(counts.clamp(min=1), quota)

    def masked(self, total: int, steps: int) -> list[int] | None:  # noqa: ARG002 (the contract's)
        """See `Transfer.masked`."""
        return None


TRANSFERS: Final[Mapping[str, type[Transfer]]] = {
    "linear": Linear,
    "cosine": Cosine,
    "threshold": Threshold,
    "entropy_bound": EntropyBound,
}


def build_transfer(choice: Choice) -> Transfer:
    """The transfer that `choice` names; raises ValueError."""
    return build("transfer", TRANSFERS, choice)


def _finish(counts: Tensor, quota: Quota) -> Tensor:
    return torch.where(quota.step >= quota.steps - 1, quota.masked, torch.minimum(counts, quota.masked))
