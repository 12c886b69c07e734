"""Few at first, more later."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.transfer.base import Quota, Transfer, finish


@dataclass(frozen=True)
class Cosine(Transfer):
    """Few at first, more later: after step i of T, from 0, ceil(total cos(pi/2 (i + 1) / T)) are still masked.

    Source: MaskGIT's cosine masking schedule (arXiv 2202.04200). With about as many steps as positions the first
    steps commit nothing.
    """

    idles: ClassVar[bool] = True

    def counts(self, quota: Quota) -> Tensor:
        """Number of positions masked beyond the schedule [R]."""
        left = self._left(quota.total, quota.step, quota.steps)
        return finish((quota.masked - left).clamp(min=0), quota)

    def masked(self, total: int, steps: int) -> list[int] | None:
        """Masked positions before each step of a block of `total`, by the cosine."""
        step = torch.arange(steps - 1)
        left = self._left(torch.tensor(total), step, torch.tensor(steps))
        return [total, *(count for count in left.tolist() if count > 0)]

    @staticmethod
    def _left(total: Tensor, step: Tensor, steps: Tensor) -> Tensor:
        share = torch.cos(math.pi / 2 * (step + 1).double() / steps)
        # cos(pi / 3) comes out above 1/2: what is a whole number but for rounding is that number.
        return (total * share - 1e-9).ceil().long()
