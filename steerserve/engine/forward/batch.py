"""The rows of a step as tensors: rebuilt when a row joins or leaves, updated in place by each step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.forward.commit_rules import CommitRules
from steerserve.engine.forward.extra_rows import ForwardRows
from steerserve.engine.forward.feature_memory import FeatureMemory
from steerserve.engine.forward.monitor import Monitor
from steerserve.engine.forward.packing import TILE, step_of_width
from steerserve.engine.forward.progress import batch_progress
from steerserve.engine.forward.sampling_tensors import SamplingTensors
from steerserve.engine.forward.states import state_scopes
from steerserve.engine.request.request import Request
from steerserve.models import ModelFacts


class Batch:
    """R rows on a canvas of width W: the longest row, or a little more. It knows what stands where and what may commit;
    how their forward passes are made is a `ModelRunner`'s."""

    def __init__(
        self, requests: Sequence[Request], facts: ModelFacts, device: torch.device, dtype: torch.dtype
    ) -> None:
        """device and dtype: of the forward passes."""
        self.requests, self.facts, self.dtype = list(requests), facts, dtype
        longest, step = max(len(request.canvas) for request in requests), step_of_width(device, dtype)
        width = min(max(TILE, -(-longest // step) * step), facts.max_length)
        canvas = torch.tensor([request.canvas + [facts.eos_id] * (width - len(request.canvas)) for request in requests])
        self.canvas = canvas.to(device)
        """[R, W] int64."""
        position = torch.arange(width)
        length, start, stop = _column([(len(r.canvas), r.start, r.stop) for r in requests]).unbind(1)
        inside = position < length[:, None]
        response = (position >= start[:, None]) & (position < stop[:, None])
        self.inside, self.response = inside.to(device), response.to(device)
        self.writing_span = self._within([r.writing_span for r in requests])
        """The positions [R, W] bool that are being written: the response, or the stretch of a round."""
        self.prompt = (position < start[:, None]).to(device)
        self.position = position.to(device)
        self.start = start.to(device)
        self.sampling = SamplingTensors.of(requests, device)
        self.rules = CommitRules(requests, device)
        self.features = FeatureMemory(self.requests, width, device)
        self.monitor = Monitor(self.requests, device)
        self.forward_rows = ForwardRows(self.requests, device)
        self.progress = batch_progress(requests, device)
        """Where the rows stand, as of the last `refresh`."""

    @property
    def device(self) -> torch.device:
        return self.canvas.device

    @property
    def captures(self) -> frozenset[int]:
        """The layers whose outputs a forward has to keep, as they arrive: they are read."""
        orders = [one.stability.facts.layer for one in self.requests if one.stability is not None]
        orders += [one.uptake.push.layer for one in self.requests if one.uptake is not None]
        return frozenset(orders) | self.monitor.layers

    @property
    def masked(self) -> Tensor:
        """Response positions [R, W] bool that are not committed: the one place that says which."""
        return (self.canvas == self.facts.mask_id) & self.response

    def begin_round(self, row: int, first: int, last: int) -> None:
        """Take note of the canvas positions [first, last) that a row begins to write anew."""
        self.writing_span[row] = self._within([(first, last)])[0]
        self.monitor.rearm(row)

    def refresh(self) -> None:
        """Take note of how far the rows have come: before a step, and whenever some of them went on."""
        self.progress = batch_progress(self.requests, self.device)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """The positions that may commit at this step, as (row [N], canvas position [N])."""
        last = torch.where(self.progress.alone, self.progress.first + 1, self.progress.last)
        row, position = (self.masked & (self.position < last[:, None])).nonzero().unbind(1)
        return row, position

    def committed(self) -> tuple[Tensor, Tensor]:
        """The committed positions of the current blocks, as (row [N], canvas position [N])."""
        inside = (self.position >= self.progress.first[:, None]) & (self.position < self.progress.last[:, None])
        row, position = (inside & ~self.masked).nonzero().unbind(1)
        return row, position

    def replaceable(self) -> tuple[Tensor, Tensor]:
        """The committed positions whose tokens the transfers of their rows may replace at this step, as (row [N],
        canvas position [N]): those of the current block that are being written."""
        if not self.rules.edits:
            none = self.position[:0]
            return none, none
        row, position = self.committed()
        mine = self.rules.editing[row] & self.writing_span[row, position]
        return row[mine], position[mine]

    def write(self, row: Tensor, position: Tensor, token: Tensor) -> None:
        """Put token [N] at (row [N], canvas position [N])."""
        self.canvas[row, position] = token

    def mask(self, places: Sequence[tuple[int, int]]) -> None:
        """Mask places, each a row and a canvas position, again."""
        if not places:
            return
        row, position = torch.tensor(places, device=self.device).unbind(1)
        self.canvas[row, position] = self.facts.mask_id
        self.features.forget(row, position)

    def shown(self) -> Tensor:
        """What the model is shown in each row of the forward [F, W]."""
        rows = self.forward_rows
        canvas = rows.spread(self.canvas)
        if rows.hides_prompt is None:
            return canvas
        hidden = rows.hides_prompt[:, None] & rows.spread(self.inside & ~self.response)
        return canvas.masked_fill(hidden, self.facts.mask_id)

    def scopes(self) -> Tensor:
        """The states [F, 5, W] that each named scope holds at this step."""
        found = state_scopes(self.inside, self.prompt, self.response, self.masked, self.facts.shift)
        return self.forward_rows.spread(found)

    def sigma(self) -> Tensor | None:
        """Noise level [F] of this step, of a model that is told it."""
        if self.facts.sigma is None:
            return None
        return self.forward_rows.spread(self.facts.sigma.total(self.rules.times(self.progress).float()))

    def state(self, position: Tensor) -> Tensor:
        """Where the states [N] stand that decide canvas positions [N]."""
        return (position - self.facts.shift).clamp(min=0)

    def keys(self, row: Tensor, position: Tensor, stream: int) -> Tensor:
        """Noise keys [N] of canvas positions; the noise counts positions from the start of the response."""
        drawn = self.sampling
        counters = (drawn.seed[row], drawn.sample[row], self.progress.step[row], position - self.start[row])
        return noise.keys(*counters, stream)

    def _within(self, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Canvas positions [S, W] bool within each of S spans."""
        first, last = _column(spans).to(self.device)[:, :, None].unbind(1)
        position = torch.arange(self.canvas.shape[1], device=self.device)
        return (position >= first) & (position < last)


def _column(rows: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)
