"""Noise schedules sigma(t) of the families whose forward takes a noise level; t runs from 1, all masked, to 0."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Sigma(Protocol):
    """Total noise and its rate; a token is masked at time t with probability 1 - exp(-total(t))."""

    def total(self, time: Tensor) -> Tensor:
        """sigma(t), of the shape and dtype of time, in which it is computed: the authors' models were told float32."""
        ...

    def rate(self, time: Tensor) -> Tensor:
        """d sigma / d t, of the shape and dtype of time."""
        ...


@dataclass(frozen=True)
class LogLinear:
    """sigma = -log(1 - (1 - eps) t): the masked share is (1 - eps) t. Source: SEDD and MDLM (arXiv 2406.07524)."""

    eps: float = 1e-3

    def total(self, time: Tensor) -> Tensor:
        """Total noise at times t [rows]."""
        return -torch.log1p(-(1 - self.eps) * time)

    def rate(self, time: Tensor) -> Tensor:
        """Derivative of the total noise at times t [rows]."""
        return (1 - self.eps) / (1 - (1 - self.eps) * time)


@dataclass(frozen=True)
class Geometric:
    """sigma = low^(1 - t) high^t. Source: SEDD (arXiv 2310.16834)."""

    low: float = 1e-4
    high: float = 20.0

    def total(self, time: Tensor) -> Tensor:
        """Total noise at times t [rows]."""
        return self.low ** (1 - time) * self.high**time

    def rate(self, time: Tensor) -> Tensor:
        """Derivative of the total noise at times t [rows]."""
        return self.total(time) * (math.log(self.high) - math.log(self.low))


def level_of_share(schedule: Sigma, share: Tensor) -> Tensor:
    """Noise level [rows] float32 at which that share [rows] of a text is masked: `share = 1 - exp(-sigma)`, no further
    than the schedule goes."""
    low, high = schedule.total(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return (-torch.log1p(-share.double())).clamp(low, high).float()
