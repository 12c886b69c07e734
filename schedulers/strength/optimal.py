"""The strength where a push moves the attribute most for what it costs: the schedule of the efficiency theorem."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.profile import CommitmentProfile, coverage
from schedulers.strength.base import EVERYWHERE, Span


@dataclass(frozen=True)
class Optimal:
    """g(p) is proportional to max(0, s(p) / c(p)), measured sensitivity over measured cost.

    Source: arXiv 2605.10971, theorem 1: of all gains of one KL it moves the attribute furthest, to first order, rho
    times as far as uniform. The clamp is ours: gains are 0 or more, and where a push moves the attribute backwards
    the best such gain is 0. Where it does so in every slice the schedule is uniform and says so.
    """

    needs_profile: ClassVar[bool] = True
    default_norm: ClassVar[str | None] = "kl"
    within: ClassVar[Span] = EVERYWHERE

    def shape(self, slices: int, profile: CommitmentProfile | None) -> Tensor:
        """The best gain of each slice [slices], float64; raises ValueError where s or c was not measured.

        On a grid coarser than the profile's it is the mean of max(0, s) over the mean of c: with s >= 0 that is the
        best gain which is constant within the slice, as the mean of s / c is not.
        """
        sensitivity, cost = torch.tensor(_measured(profile), dtype=torch.float64)
        share = coverage(slices, len(cost))
        gains = share @ sensitivity.clamp(min=0) / (share @ cost)
        return gains if gains.any() else torch.ones_like(gains)

    def note(self, profile: CommitmentProfile | None) -> str | None:
        """Says in how many of the profile's slices the gain was clamped, and the rho that is left."""
        sensitivity, cost = _measured(profile)
        backwards = sum(s < 0 for s in sensitivity)
        if max(sensitivity) <= 0:
            return "applied uniformly: a push moves the attribute forward in no slice"
        if not backwards:
            return None
        clamped = f"gains are 0 in {backwards} of {len(cost)} slices, where a push moves the attribute backwards"
        total = math.fsum(sensitivity)
        if total <= 0:
            return f"{clamped}; a uniform push moves it backwards as a whole"
        reached = math.fsum(s * s / c for s, c in zip(sensitivity, cost, strict=True) if s > 0)
        return f"{clamped}; rho with gains of 0 or more is {math.sqrt(math.fsum(cost) * reached) / total:.4g}"


def _measured(profile: CommitmentProfile | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sensitivity and cost [K] of a profile that has both."""
    if profile is None:
        raise ValueError("schedule 'optimal' needs a commitment profile: only calibrated attributes have one")
    if profile.sensitivity is None or profile.cost is None:
        lacking = " and ".join(name for name in ("sensitivity", "cost") if getattr(profile, name) is None)
        raise ValueError(
            f"schedule 'optimal' needs measured sensitivity and cost: this attribute's profile has no {lacking}"
        )
    return profile.sensitivity, profile.cost
