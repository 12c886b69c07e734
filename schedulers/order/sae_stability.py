"""Positions whose features have settled first."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from schedulers.choice import number, shown
from schedulers.order.base import Candidates


@dataclass(frozen=True)
class SaeStability:
    """The score is (1 - weight) probability + weight stability, of the position's top SAE features between steps.

    Source: ours; DLM-Scope (arXiv 2602.05859, section 5.2) observes that orders which decode well keep features
    stable before decoding, and gives no rule. At a row's first step stability is 0 and the order is `confidence`.
    """

    weight: float = 0.3
    """Share of the stability in the score, 0 to 1."""
    sae: str | None = None
    """Name of the SAE that is read; None leaves it to the engine."""

    needs: ClassVar[frozenset[str]] = frozenset({"probability", "stability"})

    def __post_init__(self) -> None:
        number("weight", self.weight, 0, 1)
        if self.sae is not None and (not isinstance(self.sae, str) or not self.sae):
            raise ValueError(f"sae must be the name of an SAE, not {shown(self.sae)}")

    def score(self, candidates: Candidates) -> Tensor:
        """The weighted mean of probability and stability [N]."""
        return (1 - self.weight) * candidates.require("probability") + self.weight * candidates.require("stability")


def feature_stability(previous_ids: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
    """Half the Jaccard similarity of the top-k feature sets of two steps, plus half where the top feature was held.

    previous_ids and ids [N, k >= 1] int64, strongest first, no id twice in a row, negative for a place that holds no
    feature; seen [N] bool, whether the position was read at the step before. Returns [N] float32, 0 where not seen.
    Source: DLM-Scope (arXiv 2602.05859), pre-decode similarity and top-1 stability.
    """
    # An id both steps have is one that comes twice, so side by side once both are sorted together.
    both = torch.cat([previous_ids, ids], dim=1).sort(dim=1).values
    shared = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)
    union = (both >= 0).sum(1) - shared
    jaccard = shared.float() / union.clamp(min=1)
    held = (previous_ids[:, 0] == ids[:, 0]) & (ids[:, 0] >= 0)
    return torch.where(seen, 0.5 * jaccard + 0.5 * held, 0.0)
