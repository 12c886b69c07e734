"""The rows of one forward as tensors: rebuilt when a row joins or leaves, updated in place by each step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.request import Request
from steerserve.models import ModelFacts
from steerserve.saes import SparseAutoencoder
from steerserve.steering.plan import SteeringPlan

TILE = 16
"""Canvases are padded to a multiple of this, as far as the model goes, so that kernels split every row alike."""
TOP_FEATURES = 32
"""How many of a position's features are kept to be compared with the next step's."""


class Batch:
    """R rows on a canvas of width W (the longest row, rounded up to TILE)."""

    def __init__(
        self, requests: Sequence[Request], facts: ModelFacts, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.requests = list(requests)
        longest = max(len(request.canvas) for request in requests)
        width = min(-(-longest // TILE) * TILE, facts.max_length)
        canvas = torch.tensor([request.canvas + [facts.eos_id] * (width - len(request.canvas)) for request in requests])
        self.canvas = canvas.to(device)
        """[R, W] int64."""
        position = torch.arange(width)
        length, start, stop = self._column([(len(r.canvas), r.start, r.stop) for r in requests]).unbind(1)
        self.lengths = length.to(device)
        inside = position < length[:, None]
        response = (position >= start[:, None]) & (position < stop[:, None])
        self.inside, self.response = inside.to(device), response.to(device)
        self.prompt = (position < start[:, None]).to(device)
        self.position = position.to(device)
        self.seed, self.sample = self._column([(r.params.seed, r.params.row) for r in requests]).to(device).unbind(1)
        self.temperature = torch.tensor([r.params.temperature for r in requests], device=device)
        self.top_p = torch.tensor([r.params.top_p for r in requests], device=device)
        self.no_eos = torch.tensor([r.params.ignore_eos for r in requests], device=device)
        self.start = start.to(device)
        self.blind = torch.tensor([r.chooses_blindly for r in requests], device=device)
        """Rows [R] bool whose positions can be chosen before anything is drawn."""
        captures = frozenset(r.stability.facts.layer for r in requests if r.stability is not None)
        self.plan = SteeringPlan([r.pushes for r in requests], device, dtype, captures)
        self.saes: dict[SparseAutoencoder, Tensor] = {}
        """Rows [R] bool that compare features of each SAE between steps."""
        for r in requests:
            if r.stability is not None and r.stability not in self.saes:
                self.saes[r.stability] = torch.tensor(
                    [other.stability is r.stability for other in requests], device=device
                )
        if self.saes:
            self.features = torch.full((len(requests), width, TOP_FEATURES), -1, dtype=torch.int64, device=device)
            for i, r in enumerate(requests):
                if r.features is not None:
                    self.features[i, : len(r.canvas)] = r.features

    @staticmethod
    def _column(rows: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64)

    def begin(self, mask_id: int) -> tuple[Tensor, Tensor]:
        """Set the plan to this step; the positions that may commit now, as (row [N], canvas position [N])."""
        masked = (self.canvas == mask_id) & self.response
        scopes = torch.stack([self.inside, self.prompt, self.response, masked, self.response & ~masked], 1)
        self.plan.set_step(torch.tensor([r.progress for r in self.requests], dtype=torch.float64), scopes)
        block_stop = torch.tensor([r.block_span[1] for r in self.requests]).to(self.canvas.device)
        row, position = (masked & (self.position < block_stop[:, None])).nonzero().unbind(1)
        return row, position

    def keys(self, row: Tensor, position: Tensor, stream: int) -> Tensor:
        """Noise keys [N] of canvas positions; the noise counts positions from the start of the response."""
        step = torch.tensor([r.step for r in self.requests], device=row.device)
        return noise.keys(self.seed[row], self.sample[row], step[row], position - self.start[row], stream)

    def close(self) -> None:
        """Hand what outlives the batch back to its requests."""
        self.plan.flush()
        if self.saes:
            for i, request in enumerate(self.requests):
                request.features = self.features[i, : len(request.canvas)].clone()
