"""The strength within one stretch of progress, nothing outside."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.choice import number
from schedulers.profile import CommitmentProfile


@dataclass(frozen=True)
class Window:
    """g(p) = 1 for start <= p < stop, else 0; a slice partly inside gets the share of it that is inside.

    Its norm is `peak`: a window of strength s is strength s inside, and a narrow one is not pushed harder for being
    narrow.
    """

    start: float
    stop: float

    needs_profile: ClassVar[bool] = False
    default_norm: ClassVar[str | None] = "peak"

    def __post_init__(self) -> None:
        start, stop = number("start", self.start, 0, 1), number("stop", self.stop, 0, 1)
        # The grid's resolution: what is narrower could vanish in rounding.
        if stop - start < 1e-6:
            raise ValueError(f"stop must be greater than start, not {stop:g} with start {start:g}")

    def shape(self, slices: int, profile: CommitmentProfile | None) -> Tensor:  # noqa: ARG002 (the contract's)
        """The share of each slice inside the window [slices], float64."""
        # A border within rounding of a slice's border is on it: no slice is to be steered by 1e-16.
        start, stop = round(self.start * slices, 9), round(self.stop * slices, 9)
        begins = torch.arange(slices, dtype=torch.float64)
        return ((begins + 1).clamp(max=stop) - begins.clamp(min=start)).clamp(min=0)

    def note(self, profile: CommitmentProfile | None) -> str | None:  # noqa: ARG002 (the contract's)
        """None: nothing can change it."""
        return None
