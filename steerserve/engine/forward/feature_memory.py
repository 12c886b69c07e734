"""The top features of each position at its last step, for orders that compare steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steerserve.engine.forward.states import TOP_FEATURES
from steerserve.engine.request.request import Request

TopFeatures = tuple[Tensor, Tensor, Tensor]
"""Top features [N, K] at (row [N], canvas position [N])."""


class FeatureMemory:
    """What R rows remember; between batches it is the rows' own."""

    def __init__(self, requests: Sequence[Request], width: int, device: torch.device) -> None:
        self._requests = requests
        self.saes = {
            sae: torch.tensor([other.stability is sae for other in requests], device=device)
            for sae in dict.fromkeys(one.stability for one in requests)
            if sae is not None
        }
        """Rows [R] bool that compare features of each SAE."""
        self._ids: Tensor | None = None
        """[R, width, TOP_FEATURES] int64; -1 where there was no last step."""
        if self.saes:
            self._ids = torch.full((len(requests), width, TOP_FEATURES), -1, dtype=torch.int64, device=device)
            for kept, one in zip(self._ids, requests, strict=True):
                if one.features is not None:
                    kept[: len(one.canvas)] = one.features

    def last(self, row: Tensor, position: Tensor, count: int) -> Tensor:
        """The last top features [N, count] at (row [N], canvas position [N]), -1 where there are none."""
        assert self._ids is not None
        return self._ids[row, position, :count]

    def remember(self, found: Sequence[TopFeatures]) -> None:
        """Keep the features of a step for the next one."""
        for row, position, ids in found:
            assert self._ids is not None
            self._ids[row, position, : ids.shape[1]] = ids

    def forget(self, row: Tensor, position: Tensor) -> None:
        """Drop what is remembered of positions that are masked again: it is of the last time they were."""
        if self._ids is not None:
            self._ids[row, position] = -1

    def close(self) -> None:
        """Hand what is remembered to the rows."""
        if self._ids is not None:
            for kept, one in zip(self._ids, self._requests, strict=True):
                one.features = kept[: len(one.canvas)].clone()
