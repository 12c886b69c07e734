"""The same strength all the way."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.profile import CommitmentProfile
from schedulers.strength.base import EVERYWHERE, Span


@dataclass(frozen=True)
class Uniform:
    """g(p) = 1. Every norm leaves it as it is."""

    needs_profile: ClassVar[bool] = False
    default_norm: ClassVar[str | None] = None
    within: ClassVar[Span] = EVERYWHERE

    def shape(self, slices: int, profile: CommitmentProfile | None) -> Tensor:  # noqa: ARG002 (the contract's)
        """1 in every slice [slices], float64."""
        return torch.ones(slices, dtype=torch.float64)

    def note(self, profile: CommitmentProfile | None) -> str | None:  # noqa: ARG002 (the contract's)
        """None: nothing can change it."""
        return None
