"""A row's limits on what it pushes, and how they are held.

`max_kl` is held by measurement: a twin without the row's own pushes runs beside it, so that what a forward is about to
commit has an exact KL before it commits. A forward that would go over what is left is made again with smaller pushes,
in the end with none. `max_predicted_kl` scales the pushes at admission where their cost is predicted then, and lowers
gains while the row runs. `max_delta` bounds what a push adds to a state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from steerserve.engine.api.events import Event, Failed, Steered
from steerserve.engine.api.params import Limits
from steerserve.engine.budget import ROUNDING
from steerserve.engine.drafts import Draft
from steerserve.engine.packing import Packed
from steerserve.engine.request import Request
from steerserve.errors import RequestError
from steerserve.steering.bounds import Bound
from steerserve.steering.names import ON_EXCEED

MOST: Final = 1e6
"""Largest limit: beyond any push that can be asked for."""
MOST_TRIES: Final = 4
"""Forward passes of one step at most, the last of them without the row's own pushes."""
AIM: Final = 0.9
"""Share of what is left that smaller pushes aim at."""
SPENT: Final = 0.99
"""Share of `max_kl` at which a row whose pushes were made smaller for it pushes no more."""
DIGITS: Final = 6
"""Binary digits of a factor: rounded down, so that the last bits of a measured KL, which may depend on the rows beside
it, change nothing."""


def check_limits(limits: Limits) -> None:
    """Raise RequestError for limits that are none."""
    for name in ("max_kl", "max_predicted_kl", "max_delta"):
        value = getattr(limits, name)
        if value is not None and not 0 < value <= MOST:
            raise RequestError(f"{name} must be above 0 and at most {MOST:g}, got {value!r}", f"limits.{name}")
    if limits.on_exceed not in ON_EXCEED:
        raise RequestError(f"on_exceed must be {' or '.join(ON_EXCEED)}, got {limits.on_exceed!r}", "limits.on_exceed")


def scale_to(limit: float, limits: Limits, drafts: Sequence[Draft], predicted: float) -> float:
    """Scale the drafts, which are predicted to cost so much, down to the limit on the predicted KL, whatever their
    schedules: the factor, 1 or less; raises RequestError where the limits refuse instead."""
    if predicted <= limit * ROUNDING:
        return 1.0
    if limits.on_exceed == "refuse":
        raise RequestError(
            f"the interventions are predicted to cost {predicted:.6g} nats a token; max_predicted_kl is {limit:g}",
            "limits.max_predicted_kl",
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


def pushing(request: Request, plan: Packed) -> bool:
    """Whether a row has pushes of its own at the step that was set."""
    return any(plan.gain(push) != 0 for push in request.own)


def hold_to_budgets(requests: Sequence[Request], plan: Packed) -> None:
    """Lower the gains of the step that was set where rows would spend more predicted KL than they have left; of rows
    whose pushes the measured KL has lowered before, to what they come to by that."""
    for request in requests:
        factor = _first_factor(request)
        if factor < 1.0 and pushing(request, plan):
            _lower(request, plan, factor)
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


def lowers(requests: Sequence[Request], nats: Sequence[float], plan: Packed) -> bool:
    """Take note of the KL of what each row is about to commit, and lower the pushes of rows that it would put over
    their limit: whether the forward is to be made again."""
    again = False
    for request, found in zip(requests, nats, strict=True):
        if not request.measures_kl:
            continue
        forward, limit, before = request.made[-1], request.kl_limit, request.measured_nats
        forward.kl = found
        # Without pushes it is 0, which is never over.
        if found == 0:
            continue
        forward.tried = forward.factor, found
        # Not a number is over, always.
        if limit is None or request.refuses or request.measured_nats <= limit:
            continue
        last = forward.tries + 1 == MOST_TRIES or not math.isfinite(found)
        _lower(request, plan, 0.0 if last else _aimed(forward.tried, limit - before) / forward.factor)
        forward.kl, forward.tries, again = 0.0, forward.tries + 1, True
    return again


def _first_factor(request: Request) -> float:
    """By how much the gains of a row are multiplied when a step is first tried: not at all before its limit on KL has
    lowered any, so that a limit which is never reached changes nothing."""
    limit = request.kl_limit
    if limit is None or request.refuses:
        return 1.0
    before = next((one for one in reversed(request.made) if one.tried is not None), None)
    if before is None or before.tried is None or before.factor == 1:
        return 1.0
    left = limit - request.measured_nats
    return min(1.0, _aimed(before.tried, left)) if left > (1 - SPENT) * limit else 0.0


def _aimed(tried: tuple[float, float], left: float) -> float:
    """The factor that is to come to most of what is left, from one that was tried and the nats that it came to.

    A KL goes with the square of a small push and by less of a large one: in proportion where the push has to become
    smaller, by the root where it may become larger, a factor comes to less than it aims at rather than to more."""
    factor, nats = tried
    share = max(0.0, AIM * left / nats)
    return _rounded(factor * (share if share < 1 else math.sqrt(share)))


def _lower(request: Request, plan: Packed, factor: float) -> None:
    request.made[-1].factor *= factor
    for push in request.own:
        plan.scale(push, factor)


def _rounded(factor: float) -> float:
    mantissa, exponent = math.frexp(factor)
    return math.ldexp(math.floor(math.ldexp(mantissa, DIGITS)), exponent - DIGITS)


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
            # What the measured limit made smaller after the budget had seen it.
            budget.charge(request.made[-1].commits / request.params.max_tokens * request.made[-1].factor ** 2)
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
