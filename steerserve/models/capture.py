"""Outputs of some layers, from a forward that ends at the deepest of them."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor


class _Deepest(Exception):
    """Ends a forward whose last wanted layer has been read."""


class _Capture:
    """A `Sites` that keeps the outputs of some layers and ends the forward after the deepest of them."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers, self.deepest = frozenset(layers), max(layers)
        self.hidden: dict[int, Tensor] = {}

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        if layer in self.layers:
            self.hidden[layer] = hidden
        if layer == self.deepest:
            raise _Deepest
        return hidden


def layer_outputs(layers: Sequence[int], forward: Callable[..., object]) -> dict[int, Tensor]:
    """Outputs [rows, width, hidden_size] of the layers, at least one, of a forward that takes a `Sites` as `sites`."""
    capture = _Capture(layers)
    with suppress(_Deepest):
        forward(sites=capture)
    return capture.hidden
