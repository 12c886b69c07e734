"""Traces: what is read of a row at the steps that its request asks for."""

from collections.abc import Sequence

import torch

from steerserve.engine.api.events import Trace
from steerserve.engine.forward.batch import Batch
from steerserve.engine.request.request import Request
from steerserve.engine.sampling.predictions import Predictions


def due_traces(batch: Batch, predictions: Predictions) -> list[Trace]:
    """Traces that are due at this step; see `keep_traces`."""
    due = [
        request
        for request in batch.requests
        if request.params.trace is not None and request.step % request.params.trace.every == 0
    ]
    if not due:
        return []
    values = predictions.readings()
    return [
        Trace(
            request.id,
            request.step,
            request.progress,
            {one.name: values[id(one.push)] / one.unit for one in request.readouts},
            _by_position(batch, request, predictions),
        )
        for request in due
    ]


def keep_traces(requests: Sequence[Request], traces: Sequence[Trace]) -> list[Trace]:
    """Keep traces for the results of their rows; the same."""
    rows = {request.id: request for request in requests}
    for trace in traces:
        rows[trace.request_id].trace.append(trace)
    return list(traces)


def _by_position(batch: Batch, request: Request, predictions: Predictions) -> dict[str, tuple[float, ...]] | None:
    """Readings of the state that decides each position of a row's response, if it asks for them."""
    if request.params.trace is None or not request.params.trace.positions:
        return None
    states = batch.state(torch.arange(request.start, request.stop, device=batch.device))
    read = {one.name: predictions.projections_of(one.push)[states] / one.unit for one in request.readouts}
    return {name: tuple(values.tolist()) for name, values in read.items()}
