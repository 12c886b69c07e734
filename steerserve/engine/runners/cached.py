"""The runner of rows that keep keys and values: computed whole where these are stale, else in part."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.packing import OVERHEAD, TILE, share, step_of_width
from steerserve.engine.forward.part_plans import PartPlans
from steerserve.engine.request.kv_cache import Reason, RowCache
from steerserve.engine.sampling.predictions import TorchPredictions
from steerserve.models import DiffusionLM
from steerserve.models.memory import Memory, new_store
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Push


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of the forward that are computed together at a step."""

    rows: tuple[int, ...]
    index: Tensor
    """The same [P]."""
    width: int
    lengths: Tensor | None
    """[P] int64; None where every row is as long as the group is wide."""
    places: tuple[Tensor, Tensor] | None
    """Canvas positions [P, length] that are computed, and which of these count; None: the canvases whole."""


class CachedRunner:
    """A `ModelRunner` that computes some rows whole and others in part, in forward passes of their own.

    States that are not computed are zero; nothing reads them, since the positions that may commit always are. Keys and
    values are written while a pass is made: those of a step that does not count are written again when it is made
    again, since what says that they are stale changes with `count` alone.
    """

    def __init__(self, batch: Batch, model: DiffusionLM) -> None:
        facts, rows = batch.facts, batch.forward_rows
        if facts.keys is None:
            raise ValueError(f"the {facts.family} family keeps no keys and values")
        self._batch, self._model = batch, model
        written = [one.cache for one in batch.requests]
        kept = [*written, *(one.bare_cache for one in rows.requests[len(written) :])]
        self._caches: list[RowCache] = [cache for cache in kept if cache is not None]
        """The cache of each row of the forward [F]; a row without pushes that is read has its own."""
        width = batch.canvas.shape[1]
        self.store = new_store(facts.num_layers, len(rows.requests), facts.keys, width, batch.device, batch.dtype)
        for row, (request, cache) in enumerate(zip(rows.requests, self._caches, strict=True)):
            if cache.kept is not None:
                length = min(len(request.canvas), cache.kept.shape[3])
                self.store[:, :, row, :, :length] = cache.kept[:, :, :, :length]
        self._lengths = [len(request.canvas) for request in rows.requests]
        self._plans = PartPlans({}, width)
        """Steering plans by the rows that are computed together."""
        self._groups: list[Group] = []
        """The groups of the step that was begun."""
        self._reasons: list[Reason | None] = []
        """Why each row is computed whole at it; None where it is not."""
        # Only now: a runner that cannot be made takes nothing away.
        for cache in self._caches:
            cache.kept = None

    def begin(self) -> None:
        """Set the gains of a step of the batch as it is."""
        batch, rows = self._batch, self._batch.forward_rows
        each = zip(rows.requests, self._caches, rows.pushes, strict=True)
        self._reasons = [cache.stale(one.block, tuple(pushes), one.progress) for one, cache, pushes in each]
        whole = self._shared([row for row, reason in enumerate(self._reasons) if reason is not None])
        part = self._shared([row for row, reason in enumerate(self._reasons) if reason is None])
        self._make_plans([*whole, *part])
        self._groups = [self._group(one, None) for one in whole]
        self._groups += [self._group(one, self._places(one)) for one in part]
        scopes = batch.scopes()
        for group in self._groups:
            plan, progress = self._plans.plans[group.rows], batch.progress.progress[rows.host_source[list(group.rows)]]
            if group.places is None:
                plan.set_step(progress, scopes[group.index, :, : group.width])
            else:
                position, there = group.places
                mine = scopes[group.index].gather(2, position[:, None].expand(-1, scopes.shape[1], -1))
                plan.set_step(progress, mine & there[:, None], position)

    def gain(self, push: Push) -> float:
        """Return the gain of a push at the step that was begun."""
        return self._plans.gain(push)

    def scale(self, push: Push, factor: float) -> None:
        """Multiply the gain of a push, for this step."""
        self._plans.scale(push, factor)

    def run(self, row: Tensor, position: Tensor) -> TorchPredictions:  # noqa: ARG002 (among what is computed anyway)
        """Make the forward pass, with candidates at (row [N], canvas position [N])."""
        batch, canvas = self._batch, self._batch.shown()
        hidden = torch.zeros(*canvas.shape, batch.facts.hidden_size, device=batch.device, dtype=batch.dtype)
        captured = {layer: torch.zeros_like(hidden) for layer in batch.captures}
        self._plans.clear()
        for group in self._groups:
            self._compute(group, canvas, hidden, captured)
        return TorchPredictions(batch, self._model, hidden, captured, self._plans)

    def count(self) -> None:
        """Let the step count, with what its last pass did to pushes and caches."""
        self._plans.count()
        rows = self._batch.forward_rows
        for one, cache, pushes, reason in zip(rows.requests, self._caches, rows.pushes, self._reasons, strict=True):
            if reason is None:
                cache.reused()
            else:
                cache.refreshed(reason, one.block, tuple(pushes), one.progress)

    def flush(self) -> None:
        """Bring what the pushes of the rows did up to date with the steps that count."""
        self._plans.flush()

    def close(self) -> None:
        """Hand what the pushes did to the rows; those that go on take their keys and values along."""
        self.flush()
        for row, (request, cache) in enumerate(zip(self._batch.forward_rows.requests, self._caches, strict=True)):
            cache.kept = None if request.finished else self.store[:, :, row, :, : len(request.canvas)]

    def _compute(self, group: Group, canvas: Tensor, hidden: Tensor, captured: dict[int, Tensor]) -> None:
        """One forward pass of some rows of canvas [F, W], into hidden and captured [F, W, hidden_size]."""
        index, width, plan = group.index, group.width, self._plans.plans[group.rows]
        store = self.store[:, :, :, :, :width]
        if group.places is None:
            memory = Memory(store, index, self._batch.position[:width].expand(len(group.rows), -1), None)
            hidden[index, :width] = self._model.resume(canvas[index, :width], memory, group.lengths, plan)
            for layer, states in plan.captured.items():
                captured[layer][index, :width] = states
            return
        position, there = group.places
        row, place = there.nonzero().unbind(1)
        memory = Memory(store, index, position, (row, place))
        states = self._model.resume(canvas[index].gather(1, position), memory, group.lengths, plan)
        for target, found in [(hidden, states), *((captured[layer], one) for layer, one in plan.captured.items())]:
            target[index[row], position[row, place]] = found[row, place]

    def _group(self, rows: tuple[int, ...], places: tuple[Tensor, Tensor] | None) -> Group:
        device, width = self._batch.device, max(self._width(row) for row in rows)
        own = [self._lengths[row] for row in rows]
        lengths = None if min(own) == width else torch.tensor(own, device=device)
        return Group(rows, torch.tensor(rows, device=device), width, lengths, places)

    def _width(self, row: int) -> int:
        """A row's canvas, padded."""
        step = step_of_width(self._batch.device, self._batch.dtype)
        return min(max(TILE, -(-self._lengths[row] // step) * step), self._batch.canvas.shape[1])

    def _shared(self, rows: list[int]) -> list[tuple[int, ...]]:
        """The rows of each forward, as `PackedForward` shares them out."""
        overhead = OVERHEAD.get(self._batch.device.type, OVERHEAD["cuda"])
        groups = share([self._width(row) for row in rows], overhead) if rows else []
        return [tuple(rows[i] for i in group) for group in groups]

    def _places(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Canvas positions [rows, length] that are computed, a multiple of TILE of them; and which of these count."""
        requests, shift = self._batch.forward_rows.requests, self._batch.facts.shift
        spans = [self._caches[row].computed(requests[row].block_span, self._lengths[row], shift) for row in rows]
        length = -(-max(last - first for first, last in spans) // TILE) * TILE
        first, last = torch.tensor(spans)[:, :, None].unbind(1)
        position = first + torch.arange(length)
        there = position < last
        return position.where(there, 0).to(self._batch.device), there.to(self._batch.device)

    def _make_plans(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Have a plan for each of these groups of rows."""
        plans = self._plans.plans
        if all(rows in plans for rows in groups):
            return
        # What a push has done is kept in order: by the plan that was in use first.
        self.flush()
        # Rows that began together stay together, and others meet in many ways: only these groups' are kept.
        made = {rows: plans.get(rows) or self._new_plan(rows) for rows in groups}
        self._plans = PartPlans(made, self._batch.canvas.shape[1])

    def _new_plan(self, rows: tuple[int, ...]) -> SteeringPlan:
        batch = self._batch
        return SteeringPlan([batch.forward_rows.pushes[row] for row in rows], batch.device, batch.dtype, batch.captures)
