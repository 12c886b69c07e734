"""The rows of one forward that keep keys and values: computed whole where these are stale, else in part."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.packing import OVERHEAD, TILE, share, step_of_width
from steerserve.engine.request.kv_cache import Reason, RowCache
from steerserve.engine.request.request import Request
from steerserve.models import DiffusionLM, ModelFacts
from steerserve.models.memory import Memory, new_store
from steerserve.steering.plan import SteeringPlan


class CachedBatch(Batch):
    """A `Batch` that computes some rows whole and others in part, in forwards of their own.

    States that are not computed are zero in what `forward` returns; nothing reads them, since the positions that may
    commit always are.
    """

    def __init__(
        self, requests: Sequence[Request], facts: ModelFacts, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(requests, facts, device, dtype)
        if facts.keys is None:
            raise ValueError(f"the {facts.family} family keeps no keys and values")
        twins = [self.requests[row] for row in self.unsteered.tolist()]
        kept = [*(request.cache for request in requests), *(request.bare_cache for request in twins)]
        self.caches: list[RowCache] = [cache for cache in kept if cache is not None]
        """Of each row of the forward [F]: a twin without pushes keeps its own."""
        self.pushes = [*(request.pushes for request in requests), *([] for _ in twins)]
        self.of = [*range(len(requests)), *self.unsteered.tolist()]
        """The row of the batch [F] that each row of the forward stands for."""
        width = self.canvas.shape[1]
        self.store = new_store(facts.num_layers, len(self.rows), facts.keys, width, device, dtype)
        for row, (request, cache) in enumerate(zip(self.rows, self.caches, strict=True)):
            if cache.kept is not None:
                length = min(len(request.canvas), cache.kept.shape[3])
                self.store[:, :, row, :, :length] = cache.kept[:, :, :, :length]
        self._lengths = [len(request.canvas) for request in self.rows]
        self._dtype, self._captures = dtype, self.plan.parts[0].plan.captures
        self._plans: dict[tuple[int, ...], SteeringPlan] = {}
        """Of the rows that are computed together, by their numbers."""
        self._reasons: list[Reason | None] = []
        """Why each row was computed whole in the last forward; None where it was not."""
        # Only now: a batch that cannot be made takes nothing away.
        for cache in self.caches:
            cache.kept = None

    def forward(
        self,
        model: DiffusionLM,
        candidates: tuple[Tensor, Tensor] | None = None,  # noqa: ARG002 (they are among what is computed anyway)
        again: bool = False,  # noqa: ARG002 (no row with a cache has a limit)
    ) -> Tensor:
        """See `Batch.forward`."""
        rows = zip(self.rows, self.caches, self.pushes, strict=True)
        stale = [cache.stale(one.block, tuple(pushes), one.progress) for one, cache, pushes in rows]
        self._reasons = stale
        whole = self._shared([row for row, reason in enumerate(stale) if reason is not None])
        part = self._shared([row for row, reason in enumerate(stale) if reason is None])
        self._group([*whole, *part])
        canvas, scopes = self.canvas[self.of], self.scopes()[self.of]
        for request in self.requests:
            request.begin()
        hidden = torch.zeros(*canvas.shape, self.facts.hidden_size, device=canvas.device, dtype=self._dtype)
        captured = {layer: torch.zeros_like(hidden) for layer in self._captures}
        for group in whole:
            self._compute(model, group, None, canvas, scopes, hidden, captured)
        for group in part:
            self._compute(model, group, self._places(group), canvas, scopes, hidden, captured)
        self.plan.captured = captured
        return hidden

    def count(self) -> None:
        """See `Batch.count`."""
        super().count()
        for one, cache, pushes, reason in zip(self.rows, self.caches, self.pushes, self._reasons, strict=True):
            if reason is None:
                cache.reused()
            else:
                cache.refreshed(reason, one.block, tuple(pushes), one.progress)

    def _compute(
        self,
        model: DiffusionLM,
        rows: tuple[int, ...],
        places: tuple[Tensor, Tensor] | None,
        canvas: Tensor,
        scopes: Tensor,
        hidden: Tensor,
        captured: dict[int, Tensor],
    ) -> None:
        """One forward of some rows of canvas [F, W], whole or at `places`, into hidden and captured [F, W,
        hidden_size]."""
        index = torch.tensor(rows, device=self.canvas.device)
        width = max(self._width(row) for row in rows)
        own = [self._lengths[row] for row in rows]
        lengths = None if min(own) == width else torch.tensor(own, device=self.canvas.device)
        store, plan = self.store[:, :, :, :, :width], self._plans[rows]
        progress = self.now.progress[[self.of[row] for row in rows]]
        if places is None:
            memory = Memory(store, index, self.position[:width].expand(len(rows), -1), None)
            plan.set_step(progress, scopes[index, :, :width])
            hidden[index, :width] = model.resume(canvas[index, :width], memory, lengths, plan)
            for layer, states in plan.captured.items():
                captured[layer][index, :width] = states
            return
        position, there = places
        row, place = there.nonzero().unbind(1)
        memory = Memory(store, index, position, (row, place))
        mine = scopes[index].gather(2, position[:, None].expand(-1, scopes.shape[1], -1)) & there[:, None]
        plan.set_step(progress, mine, position)
        states = model.resume(canvas[index].gather(1, position), memory, lengths, plan)
        for target, found in [(hidden, states), *((captured[layer], one) for layer, one in plan.captured.items())]:
            target[index[row], position[row, place]] = found[row, place]

    def lost(self) -> dict[int, int]:
        """See `Batch.lost`."""
        plans = self._plans.items()
        return {rows[index]: layer for rows, plan in plans for index, layer in plan.lost().items()}

    def settle(self) -> None:
        """See `Batch.settle`."""
        for plan in self._plans.values():
            plan.settle()

    def forget(self) -> None:
        """See `Batch.forget`."""
        for plan in self._plans.values():
            plan.forget()

    def flush(self) -> None:
        """See `Batch.flush`."""
        for plan in self._plans.values():
            plan.flush()

    def close(self) -> None:
        """See `Batch.close`; the rows that go on take their keys and values along."""
        super().close()
        for row, (request, cache) in enumerate(zip(self.rows, self.caches, strict=True)):
            cache.kept = None if request.finished else self.store[:, :, row, :, : len(request.canvas)]

    def _width(self, row: int) -> int:
        """A row's canvas, padded."""
        step = step_of_width(self.canvas.device, self._dtype)
        return min(max(TILE, -(-self._lengths[row] // step) * step), self.canvas.shape[1])

    def _shared(self, rows: list[int]) -> list[tuple[int, ...]]:
        """The rows of each forward, as `Packed` shares them out."""
        overhead = OVERHEAD.get(self.canvas.device.type, OVERHEAD["cuda"])
        groups = share([self._width(row) for row in rows], overhead) if rows else []
        return [tuple(rows[i] for i in group) for group in groups]

    def _places(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Canvas positions [rows, length] that are computed, a multiple of TILE of them; and which of these count."""
        spans = [
            self.caches[row].computed(self.rows[row].block_span, self._lengths[row], self.facts.shift) for row in rows
        ]
        length = -(-max(last - first for first, last in spans) // TILE) * TILE
        first, last = torch.tensor(spans)[:, :, None].unbind(1)
        position = first + torch.arange(length)
        there = position < last
        return position.where(there, 0).to(self.canvas.device), there.to(self.canvas.device)

    def _group(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Have a plan for each of these groups of rows."""
        if all(rows in self._plans for rows in groups):
            return
        # What a push has done is kept in order: by the plan that was in use first.
        self.flush()
        # Rows that began together stay together, and others meet in many ways: only these groups' are kept. All are
        # made before any is needed, so that a step that does not fit into memory leaves no group without one.
        self._plans = {rows: self._plans.get(rows) or self._new_plan(rows) for rows in groups}

    def _new_plan(self, rows: tuple[int, ...]) -> SteeringPlan:
        return SteeringPlan([self.pushes[row] for row in rows], self.canvas.device, self._dtype, self._captures)
