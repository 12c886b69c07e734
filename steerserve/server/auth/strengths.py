"""How hard a planned intervention pushes, as its plan tells before it runs."""

import math
from collections.abc import Mapping
from typing import Any, Final

from steerserve.server.errors import PolicyError
from steerserve.steering.names import NEUTRAL

OPEN_LOOP: Final = frozenset({"uniform", "window", "piecewise", "commitment", "optimal", "joint"})
"""Schedules whose table of gains says before the run what will be pushed."""


def peak_of(summary: Mapping[str, Any], param: str) -> float:
    """The largest |strength| that a planned intervention reaches; for multiply, its distance from doing nothing.

    param: its path in the request. Raises PolicyError for a schedule that does not say so beforehand.
    """
    schedule = summary.get("schedule") or {}
    gains, strength, kind = schedule.get("gains"), summary.get("strength"), schedule.get("type")
    if kind not in OPEN_LOOP or not gains or strength is None:
        raise PolicyError(
            f"schedule {kind!r} does not say beforehand how hard it pushes, and this key limits that",
            f"{param}.schedule",
        )
    neutral = NEUTRAL.get(str(summary.get("operator")), 0.0)
    most = max(abs(float(gain)) for gain in gains)
    # Nats go with the square of the push.
    return abs(float(strength) - neutral) * (most**2 if summary.get("unit") == "kl" else most)


def size_of(amount: float, unit: str) -> float:
    """How far a push of so much goes, which is what adds up: nats go with its square."""
    return math.sqrt(amount) if unit == "kl" else amount


def amount_of(size: float, unit: str) -> float:
    """How much a push of that size is in its unit."""
    return size**2 if unit == "kl" else size


def loudness_of(summary: Mapping[str, Any], param: str) -> float:
    """How large a planned push is at its schedule's peak, in hidden units, its layers added up.

    Raises PolicyError where the plan does not say.
    """
    sites, strength = summary.get("sites"), summary.get("strength")
    if not sites:
        raise PolicyError("this engine cannot tell how large a push is, and this key limits that", param)
    total = sum(abs(float(site["strength_hidden"])) for site in sites)
    if not strength:
        return 0.0
    most = peak_of(summary, param) / abs(float(strength))
    return total * (math.sqrt(most) if summary.get("unit") == "kl" else most)
