"""A row's limits on what it pushes, and how they are held.

`max_kl` is held by measurement: a twin without the row's own pushes runs beside it, so that what a forward is about to
commit has an exact KL before it commits. A forward that would go over what is left is made again with smaller pushes,
in the end with none. `max_predicted_kl` scales the pushes at admission where their cost is predicted then, and lowers
gains while the row runs. `max_delta` bounds what a push adds to a state.
"""

from collections.abc import Mapping, Sequence

from steerserve.engine.api.events import Event, Failed, Steered
from steerserve.engine.request.request import Request

Refused = Mapping[int, tuple[int, float, float]]
"""By row of a batch: layer, |delta| / |h| and the bound that it went over."""


def account(requests: Sequence[Request], rows: Sequence[Request], refused: Refused, events: list[Event]) -> None:
    """Charge the forward just made to the rows' budgets, and end those rows in the step's events that went over a limit
    which refuses: see `end`. rows: of the forward, each with the request it stands for."""
    over: dict[str, Failed] = {}
    for row, (layer, size, bound) in refused.items():
        said = f"max_delta: pushes of |delta| / |h| {size:.4g} at layer {layer} are over the limit of {bound:g}"
        over[rows[row].id] = Failed(rows[row].id, said, limit="limits.max_delta")
    for request in requests:
        budget = request.budget
        if budget is not None:
            forward = request.made[-1]
            # The factor: what the measured limit made smaller after the budget had seen it.
            share = forward.commits / request.params.max_tokens * forward.factor**2
            budget.charge(forward.rate * share, forward.cut)
            if budget.refuses and budget.exceeded:
                said = f"max_predicted_kl: {budget.spent:.4g} nats a token are over the limit of {budget.limit:g}"
                over.setdefault(request.id, Failed(request.id, said, limit="limits.max_predicted_kl"))
        limit = request.kl_limit
        if limit is not None and request.refuses and not request.measured_nats <= limit:
            each, most = (nats / request.params.max_tokens for nats in (request.measured_nats, limit))
            said = f"max_kl: {each:.4g} measured nats a token are over the limit of {most:g}"
            over.setdefault(request.id, Failed(request.id, said, limit="limits.max_kl"))
    end(requests, over, events)


def end(requests: Sequence[Request], ends: Mapping[str, Failed], events: list[Event]) -> None:
    """End rows in a step's events, by id: of these nothing is told but that, and that their steering was changed before
    the step."""
    if not ends:
        return
    for request in requests:
        request.finished = request.finished or request.id in ends
    told = [event for event in events if event.request_id not in ends or isinstance(event, Steered)]
    events[:] = [*told, *ends.values()]
