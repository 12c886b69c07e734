"""What steering needs of an SAE: its activations, a part of a canvas at a time."""

from typing import Final, Protocol

from torch import Tensor

ENCODED: Final = 128
"""States encoded at once."""


class Encoder(Protocol):
    """What boost and multiply need of an SAE."""

    def encode(self, hidden: Tensor) -> Tensor:
        """Feature activations [..., features] of hidden states [..., hidden_size]."""
        ...


class StateEncoder(Protocol):
    """An SAE that encodes masked and visible tokens each in its own way."""

    def encode(self, hidden: Tensor, masked: Tensor) -> Tensor:
        """Feature activations [..., features] of hidden states [..., hidden_size] that are masked [...] or not."""
        ...
