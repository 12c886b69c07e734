"""Memory of the rows of one forward: places, tokens with their padding, and an estimate of the bytes."""

from dataclasses import dataclass
from typing import Self

import torch

from steerserve.engine.forward.head import BLOCK_BYTES, LEAST
from steerserve.engine.forward.packing import TILE
from steerserve.engine.request.request import Request
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM, ModelFacts
from steerserve.models.checkpoint.available_memory import amount, available_bytes

_SHARE = 0.8
"""Share of free memory for forwards: the rest is for what the estimate does not see."""
_COPIES = 8
"""As many tensors of the size of a block of logits (`engine/forward/head.py`) live at once."""


@dataclass(frozen=True)
class MemoryUse:
    """Memory of the rows of one forward, twins of guided ones included."""

    rows: int = 0
    width: int = 0
    """Canvas of the longest, padded."""
    candidates: int = 0
    """Positions that may be drawn at one step."""
    kept: int = 0
    """Canvas positions whose keys and values stay in memory."""

    @property
    def tokens(self) -> int:
        """Canvas tokens of the forward, padding included."""
        return self.rows * self.width

    def __add__(self, other: "MemoryUse") -> "MemoryUse":
        """Sum of both."""
        return MemoryUse(
            self.rows + other.rows,
            max(self.width, other.width),
            self.candidates + other.candidates,
            self.kept + other.kept,
        )


def footprint(request: Request, facts: ModelFacts) -> MemoryUse:
    """Memory of one row by itself."""
    width = min(-(-len(request.canvas) // TILE) * TILE, facts.max_length)
    kept = 0 if request.cache is None else width * request.rows
    return MemoryUse(request.rows, width, request.rows * request.block_length, kept)


@dataclass(frozen=True)
class Costs:
    """What a forward of a model takes in memory, in bytes."""

    token: int
    """Bytes of one token of the canvas, in the layer where most is held at once."""
    logits: int
    """Bytes of one candidate's logits, copies included."""
    kept: int
    """Bytes of the keys and values of one position at all layers, twice: they move when rows join or leave."""

    @classmethod
    def of(cls, model: DiffusionLM) -> Self:
        """By counting the tensors that a layer holds at once, where attention keeps no scores: five of the hidden size
        in the weights' type (the residual, its norm, queries, keys, values or what replaces them), three of the widest
        one (the gate, what it gates, their product), and six in float32 (norms, rotary positions, steering)."""
        facts, matrices = model.facts, [one for one in model.parameters() if one.ndim == 2]
        # The widest but for the vocabulary: a family does not say how wide its inner layer is.
        inner = max((n for one in matrices for n in one.shape if n < facts.vocab_size), default=0)
        inner, size = max(inner, 4 * facts.hidden_size), next(model.parameters()).element_size()
        token = size * (5 * facts.hidden_size + 3 * inner) + 4 * 6 * facts.hidden_size
        heads, wide = facts.keys or (0, 0)
        kept = 2 * facts.num_layers * 2 * heads * wide * size
        return cls(token=token, logits=4 * _COPIES * facts.vocab_size, kept=kept)

    def bytes_of(self, taken: MemoryUse) -> int:
        """Estimate of what rows of this footprint take at the widest place of a step."""
        drawn = min(self.logits * taken.candidates, max(_COPIES * BLOCK_BYTES, LEAST * self.logits))
        return self.token * taken.tokens + drawn + self.kept * taken.kept


@dataclass(frozen=True)
class MemoryLimits:
    """What one forward may take up."""

    rows: float
    tokens: int
    bytes: int | None
    """None: not known, and not bounded."""
    costs: Costs

    def hold(self, taken: MemoryUse) -> bool:
        """Tell if rows that take this much fit into one forward."""
        fits = taken.rows <= self.rows and taken.tokens <= self.tokens
        return fits and (self.bytes is None or self.costs.bytes_of(taken) <= self.bytes)

    def check(self, taken: MemoryUse) -> None:
        """Raise RequestError for a row that would not even fit into memory alone."""
        need = self.costs.bytes_of(taken)
        if self.bytes is not None and need > self.bytes:
            raise RequestError(
                f"a canvas of {taken.width} tokens takes about {amount(need)} of memory in a forward; there are "
                f"{amount(self.bytes)} for it",
                "max_tokens",
            )


def free_bytes(model: DiffusionLM, device: torch.device) -> int | None:
    """Bytes that forwards may take, of what is free now; None where the system does not tell.

    On the CPU weights may still be mapped pages that count as free although a forward needs them; where they are not,
    they have been taken already. So they are left out of what is free, but for half of it.
    """
    free = available_bytes(device)
    if free is None:
        return None
    weights = sum(one.numel() * one.element_size() for one in model.parameters()) if device.type == "cpu" else 0
    return int(_SHARE * max(free - weights, free // 2))
