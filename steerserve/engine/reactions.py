"""What rows do about what a forward read: go on, end, or have tokens written anew."""

import torch

from steerserve.engine.batch import Batch
from steerserve.engine.changes import take_back
from steerserve.engine.events import Revised


def react(batch: Batch) -> list[Revised]:
    """After a step's commits and before the rows advance: end the rows whose condition says so, mask tokens again, and
    set how hard each watching row pushes at its next forward. Progress is that of the canvas as it is now."""
    watch = batch.watch
    if not watch.rows:
        return []
    values = watch.read(batch.plan.captured, batch.response, batch.state(batch.position))
    events: list[Revised] = []
    for row in watch.rows:
        request, progress = batch.requests[row], batch.requests[row].progress
        if request.reactions is None:
            continue
        abort, again = request.reactions.due(values[row], progress)
        if abort:
            request.reactions.aborted = {"step": request.step, "progress": progress}
        if again:
            first, last = request.reactions.span(request.block_span, (request.start, request.stop))
            held = [position for position in range(first, last) if request.canvas[position] != request.mask_id]
            if held:
                events += take_back(batch, torch.full((len(held),), row), torch.tensor(held))
                request.rewind(held[0])
                span = [first - request.start, last - request.start]
                request.reactions.remasked.append(
                    {"step": request.step, "progress": progress, "span": span, "positions": len(held)}
                )
    watch.settle(values)
    return events
