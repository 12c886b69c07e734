"""What a recorded forward is: its shape, and the work it does from buffers that stay where they are to others."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from steerserve.engine.forward.packing import OVERHEAD
from steerserve.models import DiffusionLM, ModelFacts
from steerserve.steering.operators import combined

MOST_TOKENS: Final = 4096
"""Canvas tokens of the largest recorded forward: of more, the kernels take longer than to launch them."""
MOST_ROWS: Final = 64
MOST_PUSHES: Final = 4
"""Pushes of one row at one layer."""
ROWS: Final = (1, 2, 4, 8)
"""Rows that are recorded for; above these, multiples of the last."""
WIDTH: Final = 64
"""Canvases are padded to multiples of this."""


@dataclass(frozen=True)
class GraphShape:
    """What a recorded forward is for."""

    rows: int
    width: int
    layers: tuple[int, ...]
    """Layers that it steers."""

    @classmethod
    def around(cls, rows: int, width: int, layers: tuple[int, ...], longest: int) -> "GraphShape | None":
        """The smallest one for so many rows on canvases of that width, the model's longest being `longest`; None where
        there is none, or what it adds in padding costs more than the launches it saves."""
        padded = next((size for size in ROWS if rows <= size), -(-rows // ROWS[-1]) * ROWS[-1])
        wide = min(-(-width // WIDTH) * WIDTH, longest)
        fits = padded <= MOST_ROWS and padded * wide <= min(MOST_TOKENS, rows * width + OVERHEAD["cuda"])
        return cls(padded, wide, layers) if fits else None


class StaticBuffers:
    """What recorded forwards of every shape read and write, one at a time; shapes lie over each other."""

    def __init__(self, facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> None:
        layers, size = facts.num_layers, facts.hidden_size
        self.tokens = torch.zeros(MOST_TOKENS, dtype=torch.int64, device=device)
        self.lengths = torch.ones(MOST_ROWS, dtype=torch.int64, device=device)
        self.sigma = torch.zeros(MOST_ROWS, device=device)
        self.weights = torch.zeros(layers, MOST_PUSHES * MOST_TOKENS, device=device)
        self.directions = torch.zeros(layers, MOST_ROWS, MOST_PUSHES, size, device=device, dtype=dtype)
        self.norms = torch.zeros(layers, MOST_TOKENS, device=device)
        self.changed = torch.zeros(layers, MOST_TOKENS, dtype=torch.bool, device=device)
        self.hidden = torch.zeros(MOST_TOKENS * size, device=device, dtype=dtype)


class RecordedForward:
    """One forward of R rows on canvases of width W, from buffers to buffers; callable as the `Sites` of its model."""

    def __init__(self, buffers: StaticBuffers, shape: GraphShape, model: DiffusionLM) -> None:
        rows, width, size = shape.rows, shape.width, model.facts.hidden_size
        self.layers, self._model = frozenset(shape.layers), model
        self.tokens = buffers.tokens[: rows * width].view(rows, width)
        """[R, W]"""
        self.lengths = buffers.lengths[:rows]
        self.sigma = None if model.facts.sigma is None else buffers.sigma[:rows]
        self.weights = buffers.weights[:, : rows * MOST_PUSHES * width].view(-1, rows, MOST_PUSHES, width)
        """[layers, R, MOST_PUSHES, W]; 0 where nothing is pushed."""
        self.directions = buffers.directions[:, :rows]
        """[layers, R, MOST_PUSHES, hidden_size]"""
        self.norms = buffers.norms[:, : rows * width].view(-1, rows, width)
        """Norms of the states that were pushed, as they arrived: [layers, R, W]."""
        self.changed = buffers.changed[:, : rows * width].view(-1, rows, width)
        """Which of them came out other than they arrived."""
        self.hidden = buffers.hidden[: rows * width * size].view(rows, width, size)
        """The final states [R, W, hidden_size]."""

    def run(self) -> None:
        """What is recorded: it may neither wait for the device nor make tensors whose shape depends on values."""
        self.hidden.copy_(self._model(self.tokens, self.lengths, self, self.sigma))

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """Steer a layer's output [rows, length, hidden_size] by the buffers."""
        if layer not in self.layers:
            return hidden
        self.norms[layer].copy_(hidden.float().norm(dim=2))
        steered = combined(self.weights[layer].to(hidden.dtype), self.directions[layer]).add_(hidden)
        self.changed[layer].copy_((steered != hidden).any(2))
        return steered

    def fill(self, tokens: Tensor, lengths: Tensor | None, sigma: Tensor | None) -> None:
        """Take in a batch of as many rows and positions or fewer; see `DiffusionLM.forward`."""
        rows, width = tokens.shape
        more = self.tokens.shape[0] - rows
        self.tokens.copy_(F.pad(tokens, (0, self.tokens.shape[1] - width, 0, more)))
        if lengths is None:
            lengths = torch.full((rows,), width, device=tokens.device)
        # A row that is all padding sees its first position: attention over nothing would not be a number.
        self.lengths.copy_(F.pad(lengths, (0, more), value=1))
        if self.sigma is not None and sigma is not None:
            self.sigma.copy_(F.pad(sigma, (0, more)))

    def clear(self) -> None:
        """Take in a canvas of full length in every row, all of one token, and push nothing."""
        self.tokens.zero_()
        self.lengths.fill_(self.tokens.shape[1])
        self.weights.zero_()
        if self.sigma is not None:
            self.sigma.zero_()
