"""The receipt: what steering was in fact applied, returned with every steered answer."""

from typing import Any

from steerserve.engine.request import Request, Resolved
from steerserve.steering.plan import Push


def receipt(request: Request) -> dict[str, Any] | None:
    """JSON of a finished row (the plan must have been flushed); None where no steering was asked for.

    What was replaced while the row ran comes first, with the steps [from_step, until_step) at which it held."""
    if not request.interventions and not request.earlier and request.reactions is None:
        return None
    told = [_intervention(one) | {"from_step": first, "until_step": end} for one, first, end in request.earlier]
    begun = {"from_step": request.since} if request.since else {}
    return {
        "interventions": [*told, *(_intervention(one) | begun for one in request.interventions)],
        "steps": request.step,
        "forward_passes": request.forwards,
        **({} if request.reactions is None else request.reactions.receipt()),
    }


def _intervention(one: Resolved) -> dict[str, Any]:
    """The plan's summary with what came of it: the strengths of the forward passes made instead of those
    predicted."""
    applied = any(push.applied.positions for push in one.pushes)
    notes = list(one.summary["notes"])
    if not applied and (not notes or one.governor is not None):
        notes.append(
            "nothing was changed: no position of the scope needed it, or none was there while the schedule pushed"
        )
    gains = one.pushes[0].applied.gains if one.pushes else []
    return {
        **one.summary,
        "applied": applied,
        "strength_per_step": [round(one.summary["strength"] * gain, 6) for gain in gains],
        "sites": [_site(push, site) for push, site in zip(one.pushes, one.summary["sites"], strict=False)],
        "notes": notes,
        **({} if one.governor is None else one.governor.receipt()),
    }


def _site(push: Push, site: dict[str, Any]) -> dict[str, Any]:
    done = push.applied
    return {
        **site,
        "positions_touched": done.positions,
        "steps_touched": done.steps,
        "delta_ratio_mean": done.ratio_sum / done.positions if done.positions else 0.0,
        "delta_ratio_max": done.ratio_max,
    }
