"""React to what a forward read: a row goes on, ends, or has tokens written anew."""

from collections.abc import Mapping

from steerserve.engine.api.conditions import Quantity
from steerserve.engine.api.events import Event
from steerserve.engine.feedback.refine import answer_best
from steerserve.engine.forward.batch import Batch
from steerserve.engine.forward.gains import StepGains
from steerserve.engine.sampling.commit import Place, remask
from steerserve.engine.sampling.predictions import Predictions

Read = Mapping[int, Mapping[Quantity, float]]
"""What the forward told of each watching row, by row."""


def read(batch: Batch, predictions: Predictions) -> Read:
    """What the forward just made told; nothing is changed by it."""
    monitor = batch.monitor
    if not monitor.rows:
        return {}
    states, reader = batch.state(batch.position), batch.forward_rows.reader
    return monitor.read(predictions.captured, batch.writing_span, states, reader)


def react(batch: Batch, gains: StepGains, values: Read, events: list[Event]) -> list[Place]:
    """After a step's commits and before the rows advance: end the rows whose condition says so, those inside a round of
    refinement with their best draft, mask tokens again, and set how hard each watching row pushes at its next forward.
    Progress is that of the canvas as it is now; gains are those of the step.

    What was masked is added to `events` and returned: `Batch.mask` has yet to be told."""
    monitor = batch.monitor
    if not monitor.rows:
        return []
    monitor.count(values, gains)
    places: list[Place] = []
    for row in monitor.rows:
        request, progress = batch.requests[row], batch.requests[row].progress
        if request.triggers is None:
            continue
        abort, again = request.triggers.due(values[row], progress)
        if abort:
            answer = "best_draft" if answer_best(request, events) else "committed"
            request.triggers.aborted = {"step": request.step, "progress": progress, "answer": answer}
        if again:
            first, last = request.triggers.span(request.block_span, (request.start, request.stop))
            held = [(row, position) for position in range(first, last) if request.canvas[position] != request.mask_id]
            if held:
                events += remask(batch.requests, held)
                places += held
                request.rewind(held[0][1])
                span = [first - request.start, last - request.start]
                request.triggers.remasked.append(
                    {"step": request.step, "progress": progress, "span": span, "positions": len(held)}
                )
    monitor.settle(values)
    return places
