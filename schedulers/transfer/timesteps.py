"""The share of the masks that one step takes from the time left."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from schedulers.choice import number
from schedulers.transfer.base import Quota, Transfer, finish, timesteps


@dataclass(frozen=True)
class Timesteps(Transfer):
    """As many as floor(masked (1 - s / t)), t and s the times before and after the step; all at the last one.

    Source: Dream's loop (arXiv 2508.15487), under its orders MASKGIT_PLUS, TOPK_MARGIN and ENTROPY. Each row counts its
    own masks, where the published loop takes the mean over the batch.
    """

    eps: float = 1e-3
    """Time after the last step, above 0 and below 1."""

    idles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_eps(self.eps)

    def counts(self, quota: Quota) -> Tensor:
        """The share of this step [R]."""
        return finish(self._count(quota.masked, quota.step, quota.steps), quota)

    def masked(self, total: int, steps: int) -> list[int] | None:
        """Masked positions before each step of a block of `total`, by the times of the steps."""
        left = [total]
        for step in range(steps - 1):
            # The arithmetic of `_count`, without a tensor a step.
            now, then = (1 - (1 - self.eps) * i / steps for i in (step, step + 1))
            left.append(left[-1] - int(left[-1] * (1 - then / now)))
        return left

    def time(self, step: Tensor, steps: Tensor) -> Tensor | None:
        """Time t [R] float64 before a step, from 1 to eps."""
        return timesteps(step, steps, self.eps)

    def _count(self, masked: Tensor, step: Tensor, steps: Tensor) -> Tensor:
        share = 1 - timesteps(step + 1, steps, self.eps) / timesteps(step, steps, self.eps)
        return (masked * share).floor().long()


def check_eps(eps: float) -> None:
    """Raise ValueError for a last time that is not between 0 and 1."""
    if not 0 < number("eps", eps, 0, 1) < 1:
        raise ValueError(f"eps must be above 0 and below 1, not {eps!r}")
