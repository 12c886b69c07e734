"""Keys and values that stay from one forward to the next, so that a forward may make those of some positions only.

Sources: the prefix and the dual cache of Fast-dLLM (arXiv 2505.22618, section 3.2). Attention runs both ways, so what
is kept of a position goes stale as others change: whoever uses a memory decides when a full forward makes it anew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`Memory.exchange` of one layer."""


@dataclass(frozen=True, eq=False)
class Memory:
    """What one forward computes of its rows, and where it keeps and finds the keys and values of their canvases."""

    store: Tensor
    """[layers, 2, rows of the store, heads, width, head size]: keys, rotated where the family does, and values."""
    rows: Tensor
    """Rows [rows] int64 of the store that the forward is of."""
    position: Tensor
    """Canvas position [rows, length] int64 of each token; 0 where a token only fills its row up."""
    filled: tuple[Tensor, Tensor] | None
    """The tokens that do not, as (row of the forward [N], place in it [N]); None where the whole canvas is computed."""

    @property
    def width(self) -> int:
        """Positions of a canvas, padding included."""
        return self.store.shape[4]

    def exchange(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a layer has just made, [rows, heads, length, head size] each, and return what its queries attend
        to, [rows, heads, width, head size] each."""
        if self.filled is None:
            self.store[layer, 0, self.rows] = key
            self.store[layer, 1, self.rows] = value
            return key, value
        row, place = self.filled
        position = self.position[row, place]
        keys, values = self.store[layer]
        keys[self.rows[row], :, position] = key[row, :, place]
        values[self.rows[row], :, position] = value[row, :, place]
        if len(self.rows) == keys.shape[0]:
            return keys, values
        return keys[self.rows], values[self.rows]

    def turned(self, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [width, head size] of a canvas at the positions of the tokens: [rows, 1, length, head
        size], to be broadcast over heads."""
        if self.filled is None:
            return turns
        cos, sin = turns
        return cos[self.position][:, None], sin[self.position][:, None]


def new_store(
    layers: int, rows: int, shape: tuple[int, int], width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """An empty store: see `Memory.store`; shape is (heads, head size)."""
    heads, size = shape
    return torch.zeros(layers, 2, rows, heads, width, size, device=device, dtype=dtype)
