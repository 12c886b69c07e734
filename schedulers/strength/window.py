"""The strength within one stretch of progress, nothing outside."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.choice import number
from schedulers.profile import CommitmentProfile
from schedulers.strength.base import Span


@dataclass(frozen=True)
class Window:
    """g(p) = 1 for start <= p < stop, else 0, however the window lies to the slices: a norm counts those that it lies
    in as whole ones. At stop = 1 it is 1 to the end.

    Its norm is `peak`: a window of strength s is strength s inside, and a narrow one is not pushed harder for being
    narrow.
    """

    start: float
    stop: float

    needs_profile: ClassVar[bool] = False
    default_norm: ClassVar[str | None] = "peak"

    def __post_init__(self) -> None:
        start, stop = number("start", self.start, 0, 1), number("stop", self.stop, 0, 1)
        # What is narrower could vanish in rounding.
        if stop - start < 1e-6:
            raise ValueError(f"stop must be greater than start, not {stop:g} with start {start:g}")

    @property
    def within(self) -> Span:
        """From start to stop."""
        return self.start, self.stop if self.stop < 1 else math.inf

    def shape(self, slices: int, profile: CommitmentProfile | None) -> Tensor:  # noqa: ARG002 (the contract's)
        """1 in each slice that the window lies in, else 0 [slices], float64."""
        # A border within rounding of a slice's border is on it: no slice is to count for 1e-16 of it.
        start, stop = round(self.start * slices, 9), round(self.stop * slices, 9)
        begins = torch.arange(slices, dtype=torch.float64)
        return ((begins < stop) & (begins + 1 > start)).double()

    def note(self, profile: CommitmentProfile | None) -> str | None:  # noqa: ARG002 (the contract's)
        """None: nothing can change it."""
        return None
