"""Bounds on how much the pushes of a row change a state: made smaller where they would change it by more, or told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from steerserve.steering.operators import combined

LARGEST_LATENT: Final = 10.0
"""The most |delta| / |h| of a push that sets a feature's latent, at each position. An encoder that reads little of the
feature's own row, or a TopK that leaves the feature out, would else ask for any size, and at ten times the state nearly
all of it is the feature's direction. Ten times the largest activation of the bundled SAEs' ordinary features stays
within it."""


@dataclass(frozen=True)
class Bound:
    """The most by which the pushes of one row that have it may change a state at one layer, together."""

    ratio: float
    """|delta| / |h|."""
    refuse: bool = False
    """Leave a change that is larger as it is and report it, instead of making it smaller."""


class Bounds:
    """The bounds at one layer, of rows of pushes padded to one width."""

    def __init__(self, pushes: Sequence[Sequence[Bound | None]], width: int, device: torch.device) -> None:
        """pushes: the bound of each push of each row."""
        self.rows = [next((bound for bound in row if bound is not None), None) for row in pushes]
        self.refuses = any(bound is not None and bound.refuse for bound in self.rows)
        counted = [[p < len(row) and row[p] is not None for p in range(width)] for row in pushes]
        self.counted = torch.tensor(counted, device=device)[:, :, None]
        """True for the pushes that are bounded [rows, pushes, 1]."""
        largest = torch.finfo(torch.float32).max
        most = [largest if bound is None or bound.refuse else bound.ratio for bound in self.rows]
        self.most = torch.tensor(most, device=device)
        """|delta| / |h| to which a row's bounded pushes are made smaller [rows]."""
        self.found = torch.zeros(len(pushes), device=device)
        """Largest |delta| / |h| of them in the last forward [rows]."""

    def hold(self, weight: Tensor, directions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [rows, pushes, length] on directions [rows, pushes, hidden_size] with which the bounds hold for
        state [rows, length, hidden_size], and which of them were made smaller; those of pushes without a bound are left
        bit for bit."""
        counted = torch.where(self.counted, weight, 0.0)
        # The very sum that is added to the state, so that the bound is on that to the last bit.
        delta = combined(counted.to(directions.dtype), directions)
        size, norm = delta.float().norm(dim=2), state.float().norm(dim=2)
        self.found = (size / norm.clamp(min=1e-12)).amax(1)
        allowed = self.most[:, None] * norm
        over = size > allowed
        factor = torch.where(over, allowed / size.clamp(min=1e-30), 1.0)
        return torch.where(self.counted, weight * factor[:, None], weight), over[:, None] & (counted != 0)

    def refused(self) -> list[tuple[int, float, float]]:
        """The rows that went over a bound that refuses in the last forward: index, |delta| / |h|, the bound."""
        return [
            (row, size, bound.ratio)
            for row, (bound, size) in enumerate(zip(self.rows, self.found.tolist(), strict=True))
            if bound is not None and bound.refuse and size > bound.ratio
        ]
