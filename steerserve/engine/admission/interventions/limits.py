"""Limits on what a row pushes, checked and applied at admission."""

import math
from dataclasses import replace
from typing import Final

from steerserve.engine.admission.interventions.draft import InterventionDraft
from steerserve.engine.api.params import Limits
from steerserve.engine.request.kl_budget import ROUNDING
from steerserve.errors import RequestError
from steerserve.steering.bounds import Bound
from steerserve.steering.names import ON_EXCEED

MOST: Final = 1e6
"""Largest limit: beyond any push that can be asked for."""


def check_limits(limits: Limits) -> None:
    """Raise RequestError for limits that are none."""
    for name in ("max_kl", "max_predicted_kl", "max_delta"):
        value = getattr(limits, name)
        if value is not None and not 0 < value <= MOST:
            raise RequestError(f"{name} must be above 0 and at most {MOST:g}, got {value!r}", f"limits.{name}")
    if limits.on_exceed not in ON_EXCEED:
        raise RequestError(f"on_exceed must be {' or '.join(ON_EXCEED)}, got {limits.on_exceed!r}", "limits.on_exceed")


def scale_to(limit: float, limits: Limits, predicted: float) -> float:
    """The factor, 1 or less, by which all pushes are multiplied so that what is predicted to cost so much stays within
    the limit on the predicted KL, whatever the schedules; raises RequestError where the limits refuse instead."""
    if predicted <= limit * ROUNDING:
        return 1.0
    if limits.on_exceed == "refuse":
        raise RequestError(
            f"the interventions are predicted to cost {predicted:.6g} nats a token; max_predicted_kl is {limit:g}",
            "limits.max_predicted_kl",
        )
    return math.sqrt(limit / predicted)


def bounded(drafted: InterventionDraft, limits: Limits) -> InterventionDraft:
    """The draft under the limits' bound on |delta| / |h|; one that is not the caller's own is left as it is."""
    if limits.max_delta is None or drafted.asked.mandatory:
        return drafted
    return replace(drafted, bound=Bound(limits.max_delta, limits.on_exceed == "refuse"))
