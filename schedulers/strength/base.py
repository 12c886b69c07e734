"""The contract of a strength schedule."""

import math
from typing import ClassVar, Final, Protocol

from torch import Tensor

from schedulers.profile import CommitmentProfile

Span = tuple[float, float]
EVERYWHERE: Final[Span] = (0.0, math.inf)


class StrengthSchedule(Protocol):
    """A gain g(p) >= 0 over denoising progress; the strength applied is s g(p). A frozen, hashable config."""

    needs_profile: ClassVar[bool]
    """True if `shape` must be given a profile."""
    default_norm: ClassVar[str | None]
    """The norm where the caller names none; None: `kl` where the cost is known, else `l2`."""

    @property
    def within(self) -> Span:
        """The progress from which on g is what `shape` says, and from which on it is 0 again; before, it is 0."""
        ...

    def shape(self, slices: int, profile: CommitmentProfile | None) -> Tensor:
        """The mean of g over what lies `within` of each of `slices` equal slices of progress, 0 where nothing does
        [slices], float64, not all zero, no norm yet."""
        ...

    def note(self, profile: CommitmentProfile | None) -> str | None:
        """A note for the receipt on how the schedule was applied; None where it is as asked."""
        ...
