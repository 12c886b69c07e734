"""The KL budget of a row: how much of its limit it may still spend."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from schedulers import GainTable, slice_of
from steerserve.engine.api.params import SLICES
from steerserve.steering.push import Push

CrossTerms = Literal["all", "some", "none"]


@dataclass(frozen=True)
class Trajectory:
    """Progress before the forwards of a run, and the share of the response's tokens that commits at each."""

    progress: tuple[float, ...]
    shares: tuple[float, ...]


GRID: Final = Trajectory(tuple(i / SLICES for i in range(SLICES)), (1 / SLICES,) * SLICES)
"""Trajectory of a run whose forwards are not known beforehand: as fine as schedules are."""


def trajectory(progress: Sequence[float] | None) -> Trajectory:
    """Trajectory of a run with forwards at these progresses, in order, that commits everything; None: `GRID`."""
    if progress is None:
        return GRID
    return Trajectory(tuple(progress), tuple(b - a for a, b in zip(progress, (*progress[1:], 1.0), strict=True)))


@dataclass(frozen=True, eq=False)
class InterventionCost:
    """The calibrated cost of one intervention."""

    attribute: str
    density: Tensor
    """K c [SLICES] float64: a token that commits within the slice costs this times a^2 / 2 nats."""
    strength: float
    """In the attribute's own unit, before gains."""

    @property
    def uniform(self) -> float:
        """Sum of c: what the uniform push of strength 1 costs, twice."""
        return float(self.density.mean())


@dataclass(frozen=True, eq=False)
class TotalCost:
    """What I interventions cost together."""

    costs: tuple[InterventionCost, ...]
    member: Tensor
    """[I, A] float64, 1 where an intervention is of an attribute."""
    matrices: Tensor
    """K C [SLICES, A, A] float64."""
    cross: CrossTerms
    """Between which attributes the matrices have measured cross terms; between the others they are taken to be 0."""

    def rates(self, progress: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        """Nats that a token costs which commits at progress [F] under gains [F, I]: of each intervention alone [F, I],
        and of all together [F]."""
        at = slice_of(progress, SLICES)
        strength = gains.double() * torch.tensor([one.strength for one in self.costs], dtype=torch.float64)
        own = torch.stack([one.density for one in self.costs], 1)[at]
        pushed = strength @ self.member
        together = torch.einsum("fa,fab,fb->f", pushed, self.matrices[at], pushed) / 2
        return own * strength.square() / 2, together

    def over(self, run: Trajectory, gains: Tensor) -> tuple[list[float], float]:
        """Nats a response token over a run, with gains [F, I] at its forwards: of each alone, and of all together."""
        each, together = self.rates(torch.tensor(run.progress, dtype=torch.float64), gains)
        shares = torch.tensor(run.shares, dtype=torch.float64)
        return (shares @ each).tolist(), float(shares @ together)


def gains_along(progress: Sequence[float] | None, tables: Sequence[GainTable]) -> Tensor:
    """Gains [F, I] float64 of I tables at the forwards of `course(progress)`; where these are not known, those of each
    slice, whole."""
    if progress is None:
        return torch.stack([table.gains for table in tables], 1).double()
    at = torch.tensor(progress, dtype=torch.float64)
    return torch.stack([table.at(at) for table in tables], 1).double()


ROUNDING = 1 + 1e-9
"""By how much a sum may be over a limit and still be at it."""


@dataclass(eq=False)
class PredictedBudget:
    """Kept while a row runs: charged with what each forward committed, under the gains that it had."""

    limit: float
    """Nats a response token."""
    refuses: bool
    """End the row where it is over the limit; else its gains are lowered before that."""
    bill: TotalCost | None
    """Cost of the row's own pushes; None where there are none."""
    groups: tuple[tuple[Push, ...], ...]
    """Pushes of each intervention of the bill."""
    planned: tuple[float, ...] | None
    """Progress before each forward; None where it depends on draws or on the model."""
    spent: float = 0.0
    cut: int = 0
    """Forwards whose gains were lowered."""

    @property
    def exceeded(self) -> bool:
        return self.spent > self.limit * ROUNDING

    def hold(self, progress: float, masked: float, gains: list[float]) -> tuple[float, float]:
        """By how much the gains of a forward at this progress are to be multiplied, 1 or less, so that the limit holds
        whatever it commits, and the nats that each token then costs; masked: share of the response that may commit.

        Where the forwards are planned it commits its planned share, else it may commit all of that."""
        if self.bill is None:
            return 1.0, 0.0
        at = torch.tensor([progress], dtype=torch.float64)
        rate = float(self.bill.rates(at, torch.tensor([gains], dtype=torch.float64))[1])
        left, due = max(0.0, self.limit - self.spent), rate * self._share(progress, masked)
        # Where nothing is due there is nothing to lower, also where a change has left less than was spent.
        if self.refuses or due <= 0 or self.spent + due <= self.limit * ROUNDING:
            return 1.0, rate
        return math.sqrt(left / due), rate * (left / due)

    def charge(self, nats: float, cut: bool) -> None:
        """Count a forward: what it cost, and whether its gains were lowered for the limit."""
        self.cut += cut
        self.spent += nats

    def after(self, earlier: "PredictedBudget") -> "PredictedBudget":
        """The same with what a budget that it takes the place of has spent."""
        return replace(self, spent=self.spent + earlier.spent, cut=self.cut + earlier.cut)

    def _share(self, progress: float, masked: float) -> float:
        if self.planned is None:
            return masked
        here = bisect_right(self.planned, progress) - 1
        following = self.planned[here + 1] if here + 1 < len(self.planned) else 1.0
        return following - min(progress, self.planned[max(here, 0)])
