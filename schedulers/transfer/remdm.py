"""Each masked position commits, and each committed one is masked again, by a draw of its own."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from schedulers.choice import number, shown
from schedulers.transfer.base import NoiseSchedule, timesteps
from schedulers.transfer.independent import Ddpm

Limit = Literal["cap", "rescale"]


@dataclass(frozen=True)
class Remdm(Ddpm):
    """A committed token is masked again with probability sigma, and a mask commits with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), where alpha = 1 - time, t before and s after the step.

    sigma is min(eta, sigma_max) for `cap` and eta sigma_max for `rescale`, sigma_max = min(1, (1 - alpha_s) / alpha_t):
    beyond it more masks would be left than the noise schedule has. With eta 0 it is `ddpm`.

    Source: ReMDM (Wang et al., arXiv 2503.00307, sections 3 and 4.1), under the log-linear schedule, with MDLM's final
    noise removal. Both draws of a step are made from the canvas before it, so what is masked again stays so until the
    next step.
    """

    eta: float = 0.02
    """0 to 1."""
    schedule: Limit = "cap"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("eta", self.eta, 0, 1)
        if self.schedule not in get_args(Limit):
            raise ValueError(f"schedule must be {' or '.join(get_args(Limit))}, not {shown(self.schedule)}")

    @property
    def remasks(self) -> bool:
        """True if `eta` is above 0."""
        return self.eta > 0

    def hazard(self, step: Tensor, steps: Tensor, sigma: NoiseSchedule | None) -> Tensor | None:  # noqa: ARG002
        """Probability [R] float64 that a masked position commits at a step."""
        now = timesteps(step, steps, self.eps)
        # The published chance, written as that of `ddpm` and what makes up for the tokens that are masked again.
        return 1 - self._next(step, steps) / now + self._sigma(step, steps) * (1 - now) / now

    def remask(self, step: Tensor, steps: Tensor) -> Tensor | None:
        """Probability [R] float64 that a committed position is masked again at a step."""
        return self._sigma(step, steps) if self.remasks else None

    def _sigma(self, step: Tensor, steps: Tensor) -> Tensor:
        now = timesteps(step, steps, self.eps)
        most = (self._next(step, steps) / (1 - now)).clamp(max=1)
        chance = most.clamp(max=self.eta) if self.schedule == "cap" else self.eta * most
        # The step after the last only removes noise.
        return torch.where(step >= steps, torch.zeros_like(chance), chance)
