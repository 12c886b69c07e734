"""Size of a planned intervention, as its plan states before it runs."""

import math
from collections.abc import Mapping
from typing import Any

from steerserve.server.errors import PolicyError


def peak_of(summary: Mapping[str, Any], param: str) -> float:
    """The `peak` of a planned intervention: the largest strength that it reaches.

    param: its path in the request. Raises PolicyError where the plan states none, since the run decides.
    """
    peak = summary.get("peak")
    if peak is None:
        kind = (summary.get("schedule") or {}).get("type")
        raise PolicyError(
            f"schedule {kind!r} does not say beforehand how hard it pushes, and this key limits that",
            f"{param}.schedule",
        )
    return float(peak)


def size_of(amount: float, unit: str) -> float:
    """Size of a push of this amount; sizes add up, and nats go with their square."""
    return math.sqrt(amount) if unit == "kl" else amount


def amount_of(size: float, unit: str) -> float:
    """Amount of a push of this size in its unit."""
    return size**2 if unit == "kl" else size


def loudness_of(summary: Mapping[str, Any], param: str) -> float:
    """Size of a planned push at its schedule's peak, in hidden units, its layers added up.

    Raises PolicyError where the plan does not say.
    """
    sites, strength = summary.get("sites"), summary.get("strength")
    if not sites:
        raise PolicyError("this engine cannot tell how large a push is, and this key limits that", param)
    total = sum(abs(float(site["strength_hidden"])) for site in sites)
    if not strength:
        return 0.0
    unit = str(summary.get("unit"))
    return total * size_of(peak_of(summary, param), unit) / size_of(abs(float(strength)), unit)
