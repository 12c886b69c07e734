"""A row's limits on what it pushes: scaled to at admission where the cost is known then, held while it runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from steerserve.engine.budget import ROUNDING
from steerserve.engine.drafts import Draft
from steerserve.engine.events import Event, Failed, Steered
from steerserve.engine.packing import Packed
from steerserve.engine.params import Limits
from steerserve.engine.request import Request
from steerserve.errors import RequestError
from steerserve.steering.bounds import Bound
from steerserve.steering.names import ON_EXCEED

MOST: Final = 1e6
"""Largest limit: beyond any push that can be asked for."""


def check_limits(limits: Limits) -> None:
    """Raise RequestError for limits that are none."""
    for name in ("max_kl", "max_delta"):
        value = getattr(limits, name)
        if value is not None and not 0 < value <= MOST:
            raise RequestError(f"{name} must be above 0 and at most {MOST:g}, got {value!r}", f"limits.{name}")
    if limits.on_exceed not in ON_EXCEED:
        raise RequestError(f"on_exceed must be {' or '.join(ON_EXCEED)}, got {limits.on_exceed!r}", "limits.on_exceed")


def scale_to(limit: float, limits: Limits, drafts: Sequence[Draft], predicted: float) -> float:
    """Scale the drafts, which are predicted to cost so much, down to the limit on KL, whatever their schedules: the
    factor, 1 or less; raises RequestError where the limits refuse instead."""
    if predicted <= limit * ROUNDING:
        return 1.0
    if limits.on_exceed == "refuse":
        raise RequestError(
            f"the interventions are predicted to cost {predicted:.6g} nats a token; max_kl is {limit:g}",
            "limits.max_kl",
        )
    factor = math.sqrt(limit / predicted)
    for drafted in drafts:
        assert drafted.price is not None
        drafted.price = replace(drafted.price, strength=drafted.price.strength * factor)
        drafted.strength *= factor**2 if drafted.unit == "kl" else factor
        drafted.size *= factor
        for push in drafted.pushes:
            push.strength *= factor
    return factor


def set_bound(drafts: Sequence[Draft], limits: Limits) -> None:
    """Give the drafts' pushes the limits' bound on |delta| / |h|."""
    if limits.max_delta is not None:
        bound = Bound(limits.max_delta, limits.on_exceed == "refuse")
        for push in (push for drafted in drafts for push in drafted.pushes):
            push.bound = bound


def hold_to_budgets(requests: Sequence[Request], plan: Packed) -> None:
    """Lower the gains of the step that was set where rows would spend more than they have left."""
    for request in requests:
        budget = request.budget
        if budget is None:
            continue
        first, last = (0, 0) if request.over else request.block_span
        masked = request.canvas[first:last].count(request.mask_id) / request.params.max_tokens
        gains = [plan.gain(group[0]) for group in budget.groups]
        factor = budget.factor(request.made[-1].committed / request.params.max_tokens, masked, gains)
        if factor < 1.0:
            for push in (push for group in budget.groups for push in group):
                plan.scale(push, factor)


Refused = Mapping[int, tuple[int, float, float]]
"""See `SteeringPlan.refused`."""


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
            budget.charge(request.made[-1].commits / request.params.max_tokens)
            if budget.refuses and budget.exceeded:
                said = f"max_kl: {budget.spent:.4g} nats a token are over the limit of {budget.limit:g}"
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
