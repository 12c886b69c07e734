"""Compiles a strength schedule to what a step reads: a table of gains over equal slices of progress."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from schedulers.choice import integer, shown
from schedulers.profile import CommitmentProfile
from schedulers.strength.base import EVERYWHERE, Span, StrengthSchedule

NORMS: Final = ("kl", "l2", "mean", "peak")
ROUNDING: Final = 2**-22
"""Progress is a float32 quotient: 7/10 may come out below 0.7, and is meant to be on the border, not before it."""


@dataclass(frozen=True, eq=False)
class GainTable:
    """A compiled schedule: the strength applied at progress p is s times the gain of p's slice, where p is `within`."""

    gains: Tensor
    """[K] float32, >= 0."""
    norm: str
    """The norm that holds for `gains`: one of NORMS."""
    rho: float | None
    """`CommitmentProfile.efficiency` of the profile; None without one."""
    note: str | None
    """What the receipt must say; None where the schedule is as asked."""
    within: Span = EVERYWHERE
    """The progress from which on the gains hold, and from which on there is none again."""

    def at(self, progress: Tensor) -> Tensor:
        """Gains [F] float32 at progress [F]."""
        progress = progress.double()
        inside = (progress >= self.within[0]) & (progress < self.within[1])
        return torch.where(inside, self.gains[slice_of(progress, len(self.gains))], 0.0)


def compile_gains(
    schedule: StrengthSchedule, norm: str | None, profile: CommitmentProfile | None, slices: int = 64
) -> GainTable:
    """The schedule on K = `slices` equal slices of progress, scaled so that its norm holds.

    kl: sum c g^2 = sum c with the profile's cost c, the predicted KL of the uniform push of the same strength;
    l2: sum g^2 = K, the same if c were constant; mean: sum g = K; peak: max g = 1. None takes the schedule's own:
    peak for what a caller draws over progress (window, piecewise), whose strength is meant literally, and an equal
    KL (kl, or l2 where the cost is not known) for what is derived from a profile, so that schedules of one strength
    can be compared. Raises ValueError where a profile or a cost is needed and not there.
    """
    integer("slices", slices, 1, 65536)
    if schedule.needs_profile and profile is None:
        name = type(schedule).__name__.lower()
        raise ValueError(f"schedule '{name}' needs a commitment profile: only calibrated attributes have one")
    cost = None if profile is None else profile.cost_on(slices)
    if norm is None:
        norm = schedule.default_norm or ("l2" if cost is None else "kl")
    shape = schedule.shape(slices, profile)
    gains = (shape * _scale(norm, shape, cost)).float()
    if not bool(torch.isfinite(gains).all()):
        raise ValueError(f"norm '{norm}' cannot hold: the gain it asks for is too large for a float32")
    first, last = schedule.within
    within = max(0.0, first - ROUNDING), last - ROUNDING
    return GainTable(gains, norm, None if profile is None else profile.efficiency(), schedule.note(profile), within)


def slice_of(progress: Tensor, slices: int) -> Tensor:
    """The slice of each progress [rows] -> [rows] int64: floor(p K), the last one at p = 1."""
    return ((progress.double() + ROUNDING) * slices).floor().long().clamp(0, slices - 1)


def check_norm(norm: object) -> str:
    """`norm` if it is one; raises ValueError with those there are."""
    if not isinstance(norm, str) or norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {shown(norm)}")
    return norm


def _scale(norm: str, shape: Tensor, cost: Tensor | None) -> Tensor:
    slices = shape.shape[0]
    match check_norm(norm):
        case "kl":
            if cost is None:
                raise ValueError("norm 'kl' needs an attribute whose cost was measured; allowed here: l2, mean, peak")
            return (cost.sum() / (cost * shape.square()).sum()).sqrt()
        case "l2":
            return (slices / shape.square().sum()).sqrt()
        case "mean":
            return slices / shape.sum()
        case _:
            return 1 / shape.max()
