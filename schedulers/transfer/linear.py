"""The same number at every step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schedulers.transfer.base import Quota, Transfer


@dataclass(frozen=True)
class Linear(Transfer):
    """As many at every step: total // steps, and one more at the first total % steps steps.

    Unlike the others it does not take all that is left at the last step: a model that draws its own mask token leaves
    the position masked, as the published loop does. Source: LLaDA's `get_num_transfer_tokens` (arXiv 2502.09992).
    """

    def counts(self, quota: Quota) -> Tensor:
        """The share of this step [R]."""
        each, more = quota.total // quota.steps, quota.total % quota.steps
        return torch.minimum(each + (quota.step < more), quota.masked)

    def masked(self, total: int, steps: int) -> list[int] | None:
        """Masked positions before each step of a block of `total`, in equal parts."""
        each, more = divmod(total, steps)
        return [total - each * i - min(i, more) for i in range(steps if each else more)]
