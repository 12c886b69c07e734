"""A strength drawn by hand: straight lines between given points."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from schedulers.choice import number, shown
from schedulers.profile import CommitmentProfile
from schedulers.strength.base import EVERYWHERE, Span

Points = tuple[tuple[float, float], ...]

_COSINE: Final[Points] = tuple((i / 64, (1 + math.cos(math.pi * i / 64)) / 2) for i in range(65))

PRESETS: Final[Mapping[str, Points]] = {
    "ramp_up": ((0.0, 0.0), (1.0, 1.0)),
    "ramp_down": ((0.0, 1.0), (1.0, 0.0)),
    "cosine_up": tuple((p, 1 - g) for p, g in _COSINE),
    "cosine_down": _COSINE,
}
"""Linear from one end to the other, and half a cosine wave, (1 + cos(pi p)) / 2 or its complement."""


@dataclass(frozen=True)
class Piecewise:
    """g(p) is linear between points (p, g) and constant before the first and after the last.

    Give either `points`, 2 to 256 of them with p increasing within 0 to 1 and g >= 0 not all zero, or a `preset`.
    Its norm is `peak`: the strength asked for is the one at the highest point.
    """

    points: Points = ()
    preset: str | None = None

    needs_profile: ClassVar[bool] = False
    default_norm: ClassVar[str | None] = "peak"
    within: ClassVar[Span] = EVERYWHERE

    def __post_init__(self) -> None:
        if self.preset is not None:
            if not isinstance(self.preset, str) or self.preset not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(sorted(PRESETS))}, not {shown(self.preset)}")
            if self.points:
                raise ValueError("give either points or a preset, not both")
        object.__setattr__(self, "points", _points(self.points) if self.preset is None else ())

    @property
    def knots(self) -> Points:
        """The points in force, given or preset."""
        return self.points if self.preset is None else PRESETS[self.preset]

    def shape(self, slices: int, profile: CommitmentProfile | None) -> Tensor:  # noqa: ARG002 (the contract's)
        """The mean of the lines over each slice [slices], float64."""
        knots = self.knots
        knots = ((-1.0, knots[0][1]), *knots, (2.0, knots[-1][1]))
        at, gain = torch.tensor(knots, dtype=torch.float64).T
        borders = torch.arange(slices + 1, dtype=torch.float64) / slices
        low = torch.maximum(borders[:-1, None], at[:-1])
        high = torch.minimum(borders[1:, None], at[1:])
        # The mean of a line over a stretch is its value in the middle of the stretch; [slices, lines].
        middle = gain[:-1] + gain.diff() * ((low + high) / 2 - at[:-1]) / at.diff()
        means: Tensor = ((high - low).clamp(min=0) * middle).sum(1).clamp(min=0) * slices
        return means

    def note(self, profile: CommitmentProfile | None) -> str | None:  # noqa: ARG002 (the contract's)
        """None: nothing can change it."""
        return None


def _points(points: object) -> Points:
    if not isinstance(points, Sequence) or isinstance(points, str) or not 2 <= len(points) <= 256:
        count = f"{len(points)} of them" if isinstance(points, Sequence) and not isinstance(points, str) else None
        raise ValueError(
            f"points must be a list of 2 to 256 pairs [progress, gain], not {count or shown(points)}; "
            f"or give a preset: {', '.join(sorted(PRESETS))}"
        )
    read: list[tuple[float, float]] = []
    for index, pair in enumerate(points):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"points[{index}] must be a pair [progress, gain], not {shown(pair)}")
        progress = number(f"points[{index}][0], a progress,", pair[0], 0, 1)
        gain = number(f"points[{index}][1], a gain,", pair[1], 0, 1e6)
        if read and progress - read[-1][0] < 1e-6:
            raise ValueError(f"points must go up in progress: points[{index}] is at {progress:g} after {read[-1][0]:g}")
        read.append((progress, gain))
    if max(gain for _, gain in read) < 1e-6:
        raise ValueError("points must have a gain above 0 somewhere, 1e-06 at least")
    return tuple(read)
