"""Matching pursuit: an encoder that takes one feature at a time from what is left of the hidden state."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.saes.activation import Relu
from steerserve.saes.sae import FeatureStats, SaeFacts, SparseAutoencoder


@dataclass(frozen=True)
class Pursuit:
    """When the pursuit of a token ends."""

    residual_threshold: float = 0.01
    """Norm, in hidden units, below which what is left is good enough; 0 or less: never."""
    max_iterations: int | None = None
    """None: as many as the hidden size."""
    stop_on_duplicate_support: bool = True
    """End when an iteration takes a feature that is active already, or none."""


class MatchingPursuitAutoencoder(SparseAutoencoder):
    """An SAE whose encoder is its own decoder (arXiv 2506.03093; SAELens, `matching_pursuit`).

    From `r = h - b_dec`, each iteration takes the feature f with the largest `<r, W_dec[f]>`, adds that product to its
    activation and subtracts product times row from r. `pre` and `relu` are those of the first iteration.
    """

    def __init__(
        self, facts: SaeFacts, tensors: Mapping[str, Tensor], pursuit: Pursuit, stats: FeatureStats | None = None
    ) -> None:
        tied = {"W_enc": tensors["W_dec"].T, "b_enc": tensors["W_dec"].new_zeros(facts.features)}
        super().__init__(facts, {**tensors, **tied}, Relu(), stats)
        self.pursuit = pursuit

    def encode(self, hidden: Tensor) -> Tensor:
        """Activations [..., features] of hidden states [..., hidden_size], none below zero."""
        residual = (hidden.to(self.W_dec.dtype) - self.b_dec).reshape(-1, self.facts.hidden_size)
        activations = residual.new_zeros(len(residual), self.facts.features)
        going = torch.arange(len(residual), device=residual.device)
        for _ in range(self.pursuit.max_iterations or self.facts.hidden_size):
            left = residual[going]
            ids = (left @ self.W_enc).argmax(dim=1)
            rows = self.W_dec[ids]
            values = (left * rows).sum(dim=1).relu()
            fresh = (values > 0) & (activations[going, ids] == 0)
            activations[going, ids] += values
            left = left - values[:, None] * rows
            residual[going] = left
            on = torch.ones_like(fresh)
            if self.pursuit.stop_on_duplicate_support:
                on &= fresh
            if self.pursuit.residual_threshold > 0:
                on &= left.norm(dim=1) >= self.pursuit.residual_threshold
            going = going[on]
            if len(going) == 0:
                break
        return activations.reshape(*hidden.shape[:-1], self.facts.features)

    def latent(self, hidden: Tensor, feature: int, target: float) -> Tensor:  # noqa: ARG002 (the same for any)
        """The latent of one feature, which is always its activation: the product of the first iteration, which is the
        pre-activation, holds what later iterations give to other features."""
        return self.encode(hidden)[..., feature].float()

    def rank(self, hidden: Tensor) -> Tensor:
        """Features by falling activation; those that were not taken follow in the order of the first iteration."""
        activations, pre = self.encode(hidden), self.pre(hidden)
        return torch.where(activations > 0, activations, pre - pre.amax(dim=-1, keepdim=True).relu())
