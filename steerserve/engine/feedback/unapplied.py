"""Rows whose steering did not take while they ran: they end as the start-up self-test would end the server.

A push that is due and does nothing has two signs. The forward did not come by its site at all, which is known at once;
or it did and left the states as they were, which is known when what was applied is brought up to date. A push that
nothing was due of (its gain is 0, its scope empty, what it removes not there, its size lost to rounding) has neither.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

from steerserve.engine.api.events import Failed
from steerserve.engine.request.request import Request

logger = logging.getLogger(__name__)


def unapplied(rows: Sequence[Request], lost: Mapping[int, int]) -> dict[str, Failed]:
    """The ends of those rows of a forward, each with the request it stands for, that were not steered where they had a
    push: see `SteeringPlan.lost`."""
    return {rows[row].id: _failed(rows[row], layer) for row, layer in lost.items()}


def missed(requests: Iterable[Request]) -> dict[str, Failed]:
    """The ends of those rows of which a push should have changed a state and did not, of any since they began."""
    found = {}
    for request in requests:
        held = [*request.interventions, *(one for one, _, _ in request.earlier)]
        layers = [push.layer for one in held for push in one.pushes if push.applied.missed]
        if layers:
            found[request.id] = _failed(request, min(layers))
    return found


def _failed(request: Request, layer: int) -> Failed:
    logger.error("row %s is not steered: its push at layer %d did not change the states", request.id, layer)
    said = f"steering does not take: a push at layer {layer} did not change the states it is for"
    return Failed(request.id, said, unsteered=True)
