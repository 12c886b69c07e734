"""Positions that have taken the target attribute up first."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.choice import number, shown
from schedulers.order.base import Candidates


@dataclass(frozen=True)
class SaeAttribute:
    """The score is (1 - weight) probability + weight uptake, of the target attribute at the position.

    Uptake runs from 0 to 1 over the row's own candidates, by the attribute's projection. A position that is sure but
    does not carry the attribute yet waits, while the push is on, until it does. Source:
    ours. With weight 0 the order is `confidence`.
    """

    weight: float = 0.3
    """Share of the uptake in the score, 0 to 1."""
    attribute: str | None = None
    """Name of the attribute that is read; None leaves it to the engine, which takes the first that is pushed."""

    needs: ClassVar[frozenset[str]] = frozenset({"probability", "uptake"})

    def __post_init__(self) -> None:
        number("weight", self.weight, 0, 1)
        if self.attribute is not None and (not isinstance(self.attribute, str) or not self.attribute):
            raise ValueError(f"attribute must be the name of an attribute, not {shown(self.attribute)}")

    def score(self, candidates: Candidates) -> Tensor:
        """The weighted mean of probability and uptake [N]."""
        return (1 - self.weight) * candidates.require("probability") + self.weight * candidates.require("uptake")


def uptake(projection: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Share to which a position has taken an attribute up: 0 at `low` and below, 1 at `high` and above, linear between.

    projection [N], the attribute's reading at the positions; low and high in the same units, numbers or [N], the
    levels of text without the attribute and of text that has it. Returns [N] float32; 0 where high is not above low,
    which tells nothing of the position. Raises ValueError for two numbers of which high is not above low.
    """
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and not low < high:
        raise ValueError(f"high must be above low, not {high:g} with low {low:g}")
    values = projection.double()
    span = high - low
    share = ((values - low) / span).clamp(0, 1)
    return torch.where(torch.as_tensor(span, device=values.device) > 0, share, 0.0).float()
