"""What rows do about what a forward read: go on, end, or have tokens written anew."""

from collections.abc import Mapping

from steerserve.engine.api.conditions import Reading
from steerserve.engine.api.events import Event
from steerserve.engine.feedback.refine import answer_best
from steerserve.engine.forward.batch import Batch
from steerserve.engine.sampling.commit import Place, take_back

Read = Mapping[int, Mapping[Reading, float]]
"""What the forward told of each watching row, by row."""


def read(batch: Batch) -> Read:
    """What the forward just made told; nothing is changed by it."""
    watch = batch.watch
    if not watch.rows:
        return {}
    return watch.read(batch.plan.captured, batch.reach, batch.state(batch.position), batch.reader)


def react(batch: Batch, values: Read, events: list[Event]) -> list[Place]:
    """After a step's commits and before the rows advance: end the rows whose condition says so, those inside a round of
    refinement with their best draft, mask tokens again, and set how hard each watching row pushes at its next forward.
    Progress is that of the canvas as it is now.

    What was masked is added to `events` and returned: `Batch.mask` has yet to be told."""
    watch = batch.watch
    if not watch.rows:
        return []
    watch.count(values, batch.plan)
    places: list[Place] = []
    for row in watch.rows:
        request, progress = batch.requests[row], batch.requests[row].progress
        if request.reactions is None:
            continue
        abort, again = request.reactions.due(values[row], progress)
        if abort:
            answer = "best_draft" if answer_best(request, events) else "committed"
            request.reactions.aborted = {"step": request.step, "progress": progress, "answer": answer}
        if again:
            first, last = request.reactions.span(request.block_span, (request.start, request.stop))
            held = [(row, position) for position in range(first, last) if request.canvas[position] != request.mask_id]
            if held:
                events += take_back(batch.requests, held)
                places += held
                request.rewind(held[0][1])
                span = [first - request.start, last - request.start]
                request.reactions.remasked.append(
                    {"step": request.step, "progress": progress, "span": span, "positions": len(held)}
                )
    watch.settle(values)
    return places
