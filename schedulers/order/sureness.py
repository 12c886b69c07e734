"""The common base of the orders by the model's sureness of a position."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.choice import number, shown
from schedulers.order.base import Candidates


@dataclass(frozen=True)
class Sureness:
    """The score is one measure of how sure the model is of a position.

    Source of both options: Dream's loop (arXiv 2508.15487), `sample_tokens` and `alg_temp`.
    """

    filtered: bool = False
    """Measure the distribution that is drawn from, after temperature, top-p and top-k, as Dream does; else the
    model's own, as LLaDA does."""
    alg_temp: float = 0.0
    """Above 0: positions are drawn without replacement with probability softmax(score / alg_temp), not taken in
    order."""

    measure: ClassVar[str]

    def __post_init__(self) -> None:
        number("alg_temp", self.alg_temp, 0, 1e6)
        if not isinstance(self.filtered, bool):
            raise ValueError(f"filtered must be true or false, not {shown(self.filtered)}")

    @property
    def field(self) -> str:
        """Name of the field of Candidates that is measured."""
        return f"filtered_{self.measure}" if self.filtered else self.measure

    @property
    def needs(self) -> frozenset[str]:
        """Names of the fields of Candidates that `score` reads."""
        return frozenset({self.field, "uniform"} if self.alg_temp > 0 else {self.field})

    def ranked(self, sureness: Tensor, candidates: Candidates) -> Tensor:
        """The scores [N] of candidates whose sureness [N] is given."""
        if self.alg_temp == 0:
            return sureness
        # Gumbel-top-k: the largest of score + Gumbel are a draw without replacement (arXiv 1903.06059). A draw of 0
        # is one of the smallest there is, not minus infinity, which could not be told from a probability of 0.
        uniform = candidates.require("uniform").double().clamp(min=2.0**-54)
        return sureness.double() / self.alg_temp - torch.log(-torch.log(uniform))
