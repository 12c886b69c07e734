"""The contract of a transfer: the rule that says how many masked positions commit at a step."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

Ending = Literal["none", "likeliest", "draw"]
"""Fate of positions that are masked after a block's last step: they stay so, or commit in one more step, to
the likeliest token or to a drawn one."""


@dataclass(frozen=True, eq=False)
class Quota:
    """Position of each of R rows in its block, and its candidates, best first within rows (`rank`), N in all."""

    step: Tensor
    """[R] int64, this step of the block, from 0; `steps` at the one after the last, where the transfer has one."""
    steps: Tensor
    """[R] int64, steps of the block; the most there may be, where they do not bind the transfer."""
    total: Tensor
    """[R] int64, positions masked when the block began."""
    masked: Tensor
    """[R] int64, positions masked now."""
    row: Tensor
    """[N] int64, 0 to R - 1, sorted."""
    probability: Tensor | None = None
    """[N] float32 or float64, of each candidate token."""
    entropy: Tensor | None = None
    """[N] float32 or float64, nats."""
    due: Tensor | None = None
    """[N] bool, true if a position's own draw falls within its `Transfer.hazard`."""


class NoiseSchedule(Protocol):
    """Total noise sigma(t) and its rate, of a model that was trained with one."""

    def total(self, time: Tensor) -> Tensor:
        """sigma(t), of the shape of time."""
        ...

    def rate(self, time: Tensor) -> Tensor:
        """d sigma / d t, of the shape of time."""
        ...


class Transfer:
    """Says how many positions of each row commit. A frozen, hashable config."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of the candidates that it reads: fields of Candidates, or `mass` (see `hazard`)."""
    ending: ClassVar[Ending] = "none"
    idles: ClassVar[bool] = False
    """True if steps may commit nothing even where there are fewer of them than positions."""
    binds: ClassVar[bool] = True
    """True if a block makes the steps that are asked for; where not, it goes on until it is full, one position a step
    at least, and `Quota.steps` are the most that it may make."""

    @property
    def remasks(self) -> bool:
        """Tell if committed positions of a block may be masked again while it has steps left."""
        return False

    @property
    def edits(self) -> bool:
        """Tell if committed tokens of a block may be replaced by others while it has steps left: see `replaces`."""
        return False

    @property
    def revises(self) -> bool:
        """Tell if a committed token of a block may be another one later, either way."""
        return self.remasks or self.edits

    @property
    def full_steps(self) -> int:
        """The most steps that a block makes once it is full, where tokens may be replaced."""
        return 0

    def counts(self, quota: Quota) -> Tensor:
        """Number of positions that commit [R] int64, 0 to `masked`."""
        raise NotImplementedError

    def masked(self, total: int, steps: int) -> list[int] | None:  # noqa: ARG002 (the contract's)
        """Masked positions before each step of a block of `total`, as far as there are any; None where it is not
        known beforehand, because it depends on draws or on what the model says."""
        return None

    def time(self, step: Tensor, steps: Tensor) -> Tensor | None:  # noqa: ARG002 (the contract's)
        """Time t [R] float64 from 1 to 0 before a step, for a model that is told it; None where the transfer has no
        time of its own, and the masked share stands for it."""
        return None

    def hazard(
        self,
        step: Tensor,  # noqa: ARG002 (the contract's)
        steps: Tensor,  # noqa: ARG002
        sigma: NoiseSchedule | None,  # noqa: ARG002
    ) -> Tensor | None:
        """Probability [R] float64 that a masked position commits at a step, each by a draw of its own; None where
        positions do not decide by themselves. Where `needs` has `mass`, it is to be multiplied by the position's
        total ratio of token to mask probabilities."""
        return None

    def remask(self, step: Tensor, steps: Tensor) -> Tensor | None:  # noqa: ARG002 (the contract's)
        """Probability [R] float64 that a position of the block that was committed before a step is masked again at it,
        each by a draw of its own; None where none ever is."""
        return None

    def replaces(self, probability: Tensor) -> Tensor:
        """Which tokens [N] bool replace the committed ones of their positions; probability [N] float64: of each token,
        which is another one than stands there."""
        return torch.zeros_like(probability, dtype=torch.bool)


def finish(counts: Tensor, quota: Quota) -> Tensor:
    """The counts [R], at most what is masked, and all of that at a block's last step."""
    return torch.where(quota.step >= quota.steps - 1, quota.masked, torch.minimum(counts, quota.masked))


def timesteps(step: Tensor, steps: Tensor, eps: float) -> Tensor:
    """The time [R] float64 before a step of `steps` equal ones from 1 to eps."""
    return 1 - (1 - eps) * step.double() / steps.double()
