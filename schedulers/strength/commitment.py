"""The strength where the attribute forms by itself: the commitment-based schedule."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.choice import integer, number
from schedulers.profile import CommitmentProfile, coverage
from schedulers.strength.base import EVERYWHERE, Span


@dataclass(frozen=True)
class Commitment:
    """g is constant within each of `blocks` equal blocks and proportional to its fraction f_b, zero where f_b < gate.

    Source: arXiv 2605.10971, block fractions and adaptive strengths. Where nothing forms, or every fraction is below
    the gate, it is uniform and says so.
    """

    blocks: int = 8
    gate: float = 0.02

    needs_profile: ClassVar[bool] = True
    default_norm: ClassVar[str | None] = None
    within: ClassVar[Span] = EVERYWHERE

    def __post_init__(self) -> None:
        integer("blocks", self.blocks, 1, 1024)
        number("gate", self.gate, 0, 1)

    def shape(self, slices: int, profile: CommitmentProfile | None) -> Tensor:
        """The mean of the gated fractions over each slice [slices], float64; raises ValueError without a profile."""
        fractions = self._gated(profile)
        if not fractions.any():
            return torch.ones(slices, dtype=torch.float64)
        return coverage(slices, self.blocks) @ fractions

    def note(self, profile: CommitmentProfile | None) -> str | None:
        """Says when the schedule fell back to uniform."""
        if profile is None:
            return None
        if not profile.rises(self.blocks).any():
            return f"applied uniformly: the attribute's curve rises over none of the {self.blocks} blocks"
        if not self._gated(profile).any():
            return f"applied uniformly: each of the {self.blocks} block fractions is below the gate {self.gate:g}"
        return None

    def _gated(self, profile: CommitmentProfile | None) -> Tensor:
        if profile is None:
            raise ValueError("schedule 'commitment' needs a commitment profile: only calibrated attributes have one")
        if not profile.rises(self.blocks).any():
            return torch.zeros(self.blocks, dtype=torch.float64)
        fractions = profile.fractions(self.blocks)
        return torch.where(fractions < self.gate, torch.zeros_like(fractions), fractions)
