"""The receipt: what steering was in fact applied, returned with every steered answer."""

from typing import Any

from steerserve.engine.request import Request


def receipt(request: Request) -> dict[str, Any] | None:
    """JSON of a finished row (the plan must have been flushed); None where no steering was asked for."""
    if not request.interventions:
        return None
    return {
        "interventions": [
            {
                **one.summary,
                "sites": [_site(push, site) for push, site in zip(one.pushes, one.summary["sites"], strict=True)],
            }
            if one.pushes
            else {**one.summary, "applied": False}
            for one in request.interventions
        ],
        "steps": request.step,
    }


def _site(push: Any, site: dict[str, Any]) -> dict[str, Any]:
    done = push.applied
    return {
        **site,
        "positions_touched": done.positions,
        "steps_touched": done.steps,
        "delta_ratio_mean": done.ratio_sum / done.positions if done.positions else 0.0,
        "delta_ratio_max": done.ratio_max,
    }
