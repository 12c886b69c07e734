"""By which orders and transfers the rows of a batch commit."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from schedulers import Random
from steerserve.engine.forward.progress import BatchProgress
from steerserve.engine.request.request import Request

Rule = TypeVar("Rule")


class CommitRules:
    """The orders and transfers of R rows, each with the rows that have it."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._device = device
        self.orders = self._members([one.order for one in requests])
        """Every order of the batch, and its rows [R] bool."""
        self.transfers = self._members([one.transfer for one in requests])
        self.orderless = self.rows([isinstance(one.order, Random) for one in requests])
        """Rows [R] bool whose positions commit in random order."""
        self.blind = self.rows([one.chooses_blindly for one in requests])
        """Rows [R] bool whose positions can be chosen before anything is drawn."""
        self.editing = self.rows([one.transfer.edits for one in requests])
        """Rows [R] bool of which committed tokens may be replaced."""
        self.edits = any(one.transfer.edits for one in requests)
        """True if there are such rows."""
        self.needs = frozenset[str]().union(*(one.order.needs | one.transfer.needs for one in requests))
        """What they need to know of candidates."""

    def rows(self, chosen: Sequence[bool]) -> Tensor:
        """Rows of the batch as a tensor [R] bool."""
        return torch.tensor(chosen, device=self._device)

    def times(self, progress: BatchProgress) -> Tensor:
        """Time t [R] float64, 1 at the start and 0 at the end: the transfer's own, else the masked share."""
        found = progress.share
        for transfer, mine in self.transfers:
            own = transfer.time(progress.block_step, progress.block_steps)
            if own is not None:
                found = torch.where(mine, own, found)
        return found

    def _members(self, rules: Sequence[Rule]) -> list[tuple[Rule, Tensor]]:
        return [(one, self.rows([other == one for other in rules])) for one in dict.fromkeys(rules)]
