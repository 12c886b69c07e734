"""What a step changes in the canvases of a batch, and the events that tell it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.batch import Batch
from steerserve.engine.events import Committed, Revised, Trace
from steerserve.engine.request import Request


def commit(batch: Batch, row: Tensor, position: Tensor, token: Tensor, probability: Tensor) -> list[Committed]:
    """Write token [N] at (row [N], canvas position [N])."""
    batch.canvas[row, position] = token
    found: list[list[tuple[int, int, float]]] = [[] for _ in batch.requests]
    # Whole numbers are exact in float64: one transfer from the device instead of four.
    told = torch.stack([row.double(), position.double(), token.double(), probability.log()], dim=1)
    for row_, position_, token_, lp in told.tolist():
        r, p, t = int(row_), int(position_), int(token_)
        # A model that may draw its own mask token leaves the position masked: nothing was committed.
        if t != batch.facts.mask_id:
            found[r].append((p, t, lp))
    events = []
    for request, commits in zip(batch.requests, found, strict=True):
        request.made[-1].commits = len(commits)
        for p, t, lp in commits:
            request.canvas[p] = t
            if request.params.logprobs:
                request.logprobs[p - request.start] = lp
        if commits:
            positions = tuple(p - request.start for p, _, _ in commits)
            logprobs = tuple(lp for _, _, lp in commits) if request.params.logprobs else None
            events.append(Committed(request.id, request.step, positions, tuple(t for _, t, _ in commits), logprobs))
    return events


def revise(batch: Batch, requests: Sequence[Request]) -> list[Revised]:
    """Mask those committed positions of `requests` again whose draws say so at this step."""
    due = [one for one in requests if one.transfer.remasks]
    if not due:
        return []
    row, position = batch.held()
    uniform = noise.uniform(batch.keys(row, position, noise.REMASK))
    chance = torch.zeros(len(batch.requests), dtype=torch.float64, device=row.device)
    now, revising = batch.now, batch.members([one in due for one in batch.requests])
    for transfer, mine in batch.transfers:
        own = transfer.remask(now.block_step, now.block_steps)
        if own is not None:
            chance = torch.where(mine & revising, own, chance)
    taken = uniform < chance[row]
    return take_back(batch, row[taken], position[taken])


def take_back(batch: Batch, row: Tensor, position: Tensor) -> list[Revised]:
    """Mask committed positions, (row [N], canvas position [N]), again."""
    batch.canvas[row, position] = batch.facts.mask_id
    if batch.saes:
        # What an order remembers of a position is of the last time it was masked, not of the last step.
        batch.features[row, position] = -1
    found: list[list[int]] = [[] for _ in batch.requests]
    for r, p in zip(row.tolist(), position.tolist(), strict=True):
        batch.requests[r].canvas[p] = batch.facts.mask_id
        found[r].append(p - batch.requests[r].start)
    told = zip(batch.requests, found, strict=True)
    return [Revised(request.id, request.step, tuple(positions)) for request, positions in told if positions]


def readings(batch: Batch) -> list[Trace]:
    """Traces that are due at this step, read before its push."""
    due = [
        request
        for request in batch.requests
        if request.params.trace is not None and request.step % request.params.trace.every == 0
    ]
    if not due:
        return []
    values = batch.plan.readings()
    traces = [
        Trace(
            request.id,
            request.step,
            request.progress,
            {one.attribute: values[id(one.push)] / one.residual_norm for one in request.readouts},
            _by_position(batch, request),
        )
        for request in due
    ]
    for request, trace in zip(due, traces, strict=True):
        request.trace.append(trace)
    return traces


def _by_position(batch: Batch, request: Request) -> dict[str, tuple[float, ...]] | None:
    """Readings of the state that decides each position of a row's response, in residual units, if it asks for them."""
    if request.params.trace is None or not request.params.trace.positions:
        return None
    states = batch.state(torch.arange(request.start, request.stop, device=batch.canvas.device))
    return {
        one.attribute: tuple((batch.plan.projections(one.push)[states] / one.residual_norm).tolist())
        for one in request.readouts
    }
