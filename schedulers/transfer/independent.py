"""Each masked position commits or not by a draw of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.order.selection import per_row
from schedulers.transfer.base import Ending, NoiseSchedule, Quota, Transfer, timesteps
from schedulers.transfer.timesteps import check_eps


class Independent(Transfer):
    """As many as there are positions whose draw falls within their hazard; under order `random` those very ones."""

    needs: ClassVar[frozenset[str]] = frozenset({"uniform"})
    idles: ClassVar[bool] = True
    eps: float

    def __post_init__(self) -> None:
        check_eps(self.eps)

    def counts(self, quota: Quota) -> Tensor:
        """Number of positions whose own draw commits them [R]; all that is left at the step after the last."""
        if quota.due is None:
            raise ValueError("this transfer needs the candidates' draws, which were not made")
        due = per_row(quota.due.long(), quota.row, quota.step.shape[0])
        return torch.where(quota.step >= quota.steps, quota.masked, due)

    def time(self, step: Tensor, steps: Tensor) -> Tensor | None:
        """Time t [R] float64 before a step, from 1 to eps."""
        return timesteps(step, steps, self.eps)

    def _next(self, step: Tensor, steps: Tensor) -> Tensor:
        return timesteps((step + 1).minimum(steps), steps, self.eps)


@dataclass(frozen=True)
class Origin(Independent):
    """Each mask commits with probability 1 - s / t, t and s the times before and after the step; all at the last one.

    Source: Dream's ORIGIN (arXiv 2508.15487).
    """

    eps: float = 1e-3
    """Time after the last step, above 0 and below 1."""

    def hazard(self, step: Tensor, steps: Tensor, sigma: NoiseSchedule | None) -> Tensor | None:  # noqa: ARG002
        """Probability [R] float64 that a masked position commits at a step, as the class states it."""
        share = 1 - timesteps(step + 1, steps, self.eps) / timesteps(step, steps, self.eps)
        return torch.where(step >= steps - 1, torch.ones_like(share), share)


@dataclass(frozen=True)
class Ddpm(Independent):
    """Each mask commits with probability 1 - s / t; what is masked after the last step takes its likeliest token.

    Source: MDLM's ancestral sampler (arXiv 2406.07524, section 3.2.2), `ddpm` and `ddpm_cache` in its code, and its
    final noise removal. Under a log-linear schedule the two differ only in that the second reuses the prediction of a
    step that changed nothing. Here a step that changes nothing makes no forward at all, which gives the same
    distribution without anything to keep, also where steering changes between steps.
    """

    eps: float = 1e-5
    """Time after the last step, above 0 and below 1."""

    ending: ClassVar[Ending] = "likeliest"

    def hazard(self, step: Tensor, steps: Tensor, sigma: NoiseSchedule | None) -> Tensor | None:  # noqa: ARG002
        """Probability [R] float64 that a masked position commits at a step, as the class states it."""
        return 1 - self._next(step, steps) / timesteps(step, steps, self.eps)


@dataclass(frozen=True)
class Analytic(Independent):
    """Each mask commits with probability expm1(sigma(t) - sigma(s)) times the sum of its token ratios.

    Source: SEDD's analytic (Tweedie) predictor on the absorbing graph (arXiv 2310.16834, section 4.2) and its final
    denoising, which draws every token left.
    """

    eps: float = 1e-5
    """Time after the last step, above 0 and below 1."""

    needs: ClassVar[frozenset[str]] = frozenset({"uniform", "mass"})
    ending: ClassVar[Ending] = "draw"

    def hazard(self, step: Tensor, steps: Tensor, sigma: NoiseSchedule | None) -> Tensor | None:
        """Probability [R] float64 that a masked position commits at a step, as the class states it."""
        now = _of_score_model(sigma).total(timesteps(step, steps, self.eps))
        return torch.expm1(now - _of_score_model(sigma).total(self._next(step, steps)))


@dataclass(frozen=True)
class Euler(Independent):
    """Each mask commits with probability dt sigma'(t) times the sum of its token ratios, one Euler step of the
    reverse process.

    Source: SEDD's Euler predictor on the absorbing graph (arXiv 2310.16834, section 4.2) and its final denoising.
    """

    eps: float = 1e-5
    """Time after the last step, above 0 and below 1."""

    needs: ClassVar[frozenset[str]] = frozenset({"uniform", "mass"})
    ending: ClassVar[Ending] = "draw"

    def hazard(self, step: Tensor, steps: Tensor, sigma: NoiseSchedule | None) -> Tensor | None:
        """Probability [R] float64 that a masked position commits at a step, as the class states it."""
        time = timesteps(step, steps, self.eps)
        return (time - self._next(step, steps)) * _of_score_model(sigma).rate(time)


def _of_score_model(sigma: NoiseSchedule | None) -> NoiseSchedule:
    if sigma is None:
        raise ValueError("this transfer needs the noise schedule of a score model, which this model has not")
    return sigma
