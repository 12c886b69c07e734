"""What steering needs of an SAE: its activations, a part of a canvas at a time, and how a latent is set."""

from typing import Final, Protocol

from torch import Tensor

ENCODED: Final = 128
"""States encoded at once."""


class Encoder(Protocol):
    """What the operators of features need of an SAE; see `steerserve.saes.SparseAutoencoder`."""

    def encode(self, hidden: Tensor) -> Tensor:
        """Feature activations [..., features] of hidden states [..., hidden_size]."""
        ...

    def latent(self, hidden: Tensor, feature: int, target: float) -> Tensor:
        """The value [...] from which a feature's latent is set to target, of hidden states [..., hidden_size]."""
        ...

    def row_norm(self, feature: int) -> float:
        """Norm of a feature's decoder row: hidden units of an activation of 1."""
        ...

    def per_latent(self, feature: int) -> float:
        """Hidden units along a feature's direction that change its latent by 1."""
        ...


class StateEncoder(Protocol):
    """An SAE that encodes masked and visible tokens each in its own way."""

    def encode(self, hidden: Tensor, masked: Tensor) -> Tensor:
        """Feature activations [..., features] of hidden states [..., hidden_size] that are masked [...] or not."""
        ...
