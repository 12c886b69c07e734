"""Lower the gains of a step where a row would go over its limits on KL."""

import math
from collections.abc import Sequence
from typing import Final, Protocol

from steerserve.engine.request.intervention import Forward
from steerserve.engine.request.request import Request
from steerserve.steering.push import Push

MOST_TRIES: Final = 4
"""Forward passes of one step at most, the last of them without the row's own pushes."""


AIM: Final = 0.9
"""Share of what is left that smaller pushes aim at."""


SPENT: Final = 0.99
"""Share of `max_kl` at which a row whose pushes were made smaller for it pushes no more."""


DIGITS: Final = 6
"""Binary digits of a factor: rounded down, so that the last bits of a measured KL, which may depend on the rows beside
it, change nothing."""


class StepGains(Protocol):
    """The gains of the pushes of a batch at the step that is being made."""

    def gain(self, push: Push) -> float:
        """A push's gain."""
        ...

    def scale(self, push: Push, factor: float) -> None:
        """Multiply it, for this step."""
        ...


def pushing(request: Request, gains: StepGains) -> bool:
    """True if a row has pushes of its own at the step that was set."""
    return any(gains.gain(push) != 0 for push in request.own)


def hold_to_budgets(requests: Sequence[Request], attempts: Sequence[Forward], gains: StepGains) -> None:
    """Lower the gains of the step that was set where rows would spend more predicted KL than they have left; of rows
    whose pushes the measured KL has lowered before, to what they come to by that. attempts: what each row is about to
    make, which takes note."""
    for request, forward in zip(requests, attempts, strict=True):
        factor = _first_factor(request)
        if factor < 1.0 and pushing(request, gains):
            _lower(request, forward, gains, factor)
        budget = request.budget
        if budget is None:
            continue
        first, last = (0, 0) if request.is_done else request.block_span
        masked = request.canvas[first:last].count(request.mask_id) / request.params.max_tokens
        own = [gains.gain(group[0]) for group in budget.groups]
        factor, forward.rate = budget.hold(forward.committed / request.params.max_tokens, masked, own)
        if factor < 1.0:
            forward.cut = True
            _note_lowered(request, forward, gains)
            for push in (push for group in budget.groups for push in group):
                gains.scale(push, factor)


def lowers(requests: Sequence[Request], attempts: Sequence[Forward], nats: Sequence[float], gains: StepGains) -> bool:
    """Take note of the KL of what each row is about to commit, and lower the pushes of rows that it would put over
    their limit: whether the forward is to be made again."""
    again = False
    for request, forward, found in zip(requests, attempts, nats, strict=True):
        if not request.measures_kl:
            continue
        limit = request.kl_limit
        forward.kl = found
        # Without pushes it is 0, which is never over.
        if found == 0:
            continue
        forward.tried = forward.factor, found
        # Not a number is over, always.
        if limit is None or request.refuses or request.nats_with(found) <= limit:
            continue
        last = forward.tries + 1 == MOST_TRIES or not math.isfinite(found)
        aimed = 0.0 if last else _aimed(forward.tried, limit - request.measured_nats) / forward.factor
        _lower(request, forward, gains, aimed)
        forward.kl, forward.tries, again = 0.0, forward.tries + 1, True
    return again


def _first_factor(request: Request) -> float:
    """By how much the gains of a row are multiplied when a step is first tried: not at all before its limit on KL has
    lowered any, so that a limit which is never reached changes nothing. What other interventions came to that held
    before says nothing of these."""
    limit = request.kl_limit
    if limit is None or request.refuses:
        return 1.0
    mine = (one for one in reversed(request.made) if one.under is request.interventions)
    before = next((one for one in mine if one.tried is not None), None)
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


def _lower(request: Request, forward: Forward, gains: StepGains, factor: float) -> None:
    _note_lowered(request, forward, gains)
    forward.factor *= factor
    for push in request.own:
        gains.scale(push, factor)


def _note_lowered(request: Request, forward: Forward, gains: StepGains) -> None:
    """Keep which interventions push at the step that was set, before their gains are made smaller."""
    for one in request.interventions:
        pushes = not one.mandatory and bool(one.pushes) and gains.gain(one.pushes[0]) != 0
        if pushes and not any(one is other for other in forward.lowered):
            forward.lowered.append(one)


def _rounded(factor: float) -> float:
    mantissa, exponent = math.frexp(factor)
    return math.ldexp(math.floor(math.ldexp(mantissa, DIGITS)), exponent - DIGITS)
