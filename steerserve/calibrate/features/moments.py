"""Mean and variance of a stream of vectors."""

import torch
from torch import Tensor


class Moments:
    """Streaming mean and variance of each component, numerically stable, a batch at a time.

    Source: Welford 1962, in the pairwise form of Chan, Golub and LeVeque 1979; kept in float64.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        """Sum of squared deviations from the mean [size]."""

    def update(self, values: Tensor) -> None:
        """Take values [n, size] in, from whatever device."""
        if len(values):
            variance, mean = torch.var_mean(values.double(), dim=0, correction=0)
            self._merge(len(values), mean.cpu(), variance.cpu() * len(values))

    def merge(self, other: "Moments") -> None:
        """Take another stream in, as if its values had come one by one."""
        if other.count:
            self._merge(other.count, other.mean, other.squares)

    @property
    def variance(self) -> Tensor:
        """Sample variance [size], divided by count - 1; zero for fewer than two values."""
        return self.squares / max(1, self.count - 1)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        gap = mean - self.mean
        self.mean = self.mean + gap * (count / total)
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.count = total


def pooled(streams: list[Moments]) -> Moments:
    """The moments of several streams together."""
    whole = Moments(len(streams[0].mean))
    for stream in streams:
        whole.merge(stream)
    return whole


def cohens_d(target: Moments, contrast: Moments) -> Tensor:
    """`(mean_A - mean_B) / sqrt((var_A + var_B) / 2)` [size]; 0 where nothing varies (arXiv 2605.10971, eq. 16)."""
    spread = ((target.variance + contrast.variance) / 2).sqrt()
    return torch.where(spread > 0, (target.mean - contrast.mean) / spread, torch.zeros_like(spread))
