"""The receipt: what steering was in fact applied, returned with every steered answer."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from steerserve.engine.admission.interventions.allocation import BEFOREHAND, limits_json
from steerserve.engine.admission.interventions.cost import total_cost
from steerserve.engine.admission.interventions.resolve import NOT_APPLIED
from steerserve.engine.api.params import Limits
from steerserve.engine.request.intervention import ActiveIntervention
from steerserve.engine.request.kl_budget import Trajectory
from steerserve.engine.request.request import Request
from steerserve.steering.bounds import LARGEST_LATENT
from steerserve.steering.push import Push


def approximated(request: Request) -> list[dict[str, Any]]:
    """What a receipt says: the plan's, with what came of it; nothing of a row that writes nothing."""
    if not request.writes:
        return []
    told = {
        "transfer": {"positions_at_bound": request.at_bound},
        "cache": request.cache.to_json() if request.cache is not None else {},
        "early_exit": {"positions_dropped": request.params.max_tokens - request.length},
    }
    return [one | told.get(one["what"], {}) for one in request.plan["approximate"]]


PLANNED: Final = frozenset({"neutral", "peak"})
"""Fields of a planned intervention that a receipt has not: the run says what was pushed."""

Held = tuple[ActiveIntervention, int, int]
"""An intervention with the steps [first, last + 1) at which it held."""


def receipt(request: Request) -> dict[str, Any] | None:
    """JSON of a finished row (the plan must have been flushed); None where neither steering nor anything approximate
    was asked for.

    What was replaced while the row ran comes first, with the steps [from_step, until_step) at which it held."""
    approximate = approximated(request)
    asked = request.interventions or request.earlier or request.triggers is not None or request.refinement is not None
    if not asked and not approximate:
        return None
    told = [
        _intervention(request, one) | {"from_step": first, "until_step": end} for one, first, end in request.earlier
    ]
    begun = {"from_step": request.since} if request.since else {}
    told += [_intervention(request, one) | begun for one in request.interventions]
    held = [*request.earlier, *((one, request.since, request.step) for one in request.interventions)]
    for entry, one in zip(told, held, strict=True):
        entry["predicted_kl"] = _predicted(request, [one])[0]
    total, cross = _predicted(request, [one for one in held if not one[0].mandatory])
    params = request.params
    return {
        "interventions": told,
        "revision": request.plan["revision"],
        "approximate": approximate,
        "steps": request.step,
        "forward_passes": request.forward_passes,
        **({"revised": request.revised} if request.transfer.revises and request.writes else {}),
        "reads": request.read_of if request.writes else None,
        **({} if request.triggers is None else request.triggers.receipt()),
        **({} if request.refinement is None else request.refinement.receipt()),
        "combine": params.combine,
        "control": params.control,
        "predicted_kl": total,
        "predicted_kl_cross_terms": cross,
        "measured_kl": request.measured_kl,
        "limits": None if params.limits is None else _limits(request, params.limits, held),
    }


def _predicted(request: Request, held: Sequence[Held]) -> tuple[float | None, str | None]:
    """Nats a response token that interventions cost together under the gains they had, and between which the cross
    terms are known; None where the cost of one that pushed is not, or there is no response."""
    pushing = [one for one in held if one[0].pushes]
    costs = [one.cost for one, _, _ in pushing if one.cost is not None]
    if len(costs) < len(pushing) or not request.writes:
        return None, None
    whole = total_cost(request.catalogue, costs)
    if whole is None:
        return 0.0, None
    length = request.params.max_tokens
    run = Trajectory(
        tuple(one.committed / length for one in request.made), tuple(one.commits / length for one in request.made)
    )
    return whole.over(run, _gains(request, pushing))[1], whole.cross


def _gains(request: Request, held: Sequence[Held]) -> Tensor:
    """The gain [F, I] that each intervention had at each forward, 0 where it did not hold."""
    gains = torch.zeros(len(request.made), len(held), dtype=torch.float64)
    for i, (one, _, _) in enumerate(held):
        at = [f for f, forward in enumerate(request.made) if any(one is other for other in forward.under)]
        gains[at, i] = torch.tensor(one.pushes[0].applied.gains, dtype=torch.float64)
    return gains


def _lowered(request: Request, one: ActiveIntervention) -> bool:
    """Tell if a limit on KL made an intervention smaller: before the run, or at a forward at which it pushed."""
    scaled = request.params.limits is not None and request.plan["limits"]["predicted_kl_scale"] < 1
    holds = any(one is other for other in request.interventions)
    if scaled and holds and not one.mandatory:
        return True
    return any(one is other for forward in request.made for other in forward.lowered)


def _limits(request: Request, limits: Limits, held: Sequence[Held]) -> dict[str, Any]:
    """The limits, and what they made smaller: `kl_steps`, the steps whose gains the measured KL lowered,
    `kl_repeats`, the forward passes that were made again for that, `predicted_kl_scale`, by which all strengths were
    multiplied before the run, `predicted_kl_steps`, the steps whose gains the predicted KL lowered, and
    `delta_positions`, positions x steps x layers, those held by the bound on latents included."""
    budget = request.budget
    return limits_json(limits) | {
        "clipped": {
            "kl_steps": sum(one.factor < 1 for one in request.made),
            "kl_repeats": sum(one.tries - 1 for one in request.made),
            "predicted_kl_scale": request.plan["limits"]["predicted_kl_scale"],
            "predicted_kl_steps": 0 if budget is None else budget.cut,
            "delta_positions": sum(
                push.applied.clipped
                for one, _, _ in held
                for push in one.pushes
                if push.bound is not None and not push.bound.refuse
            ),
        },
    }


def _intervention(request: Request, one: ActiveIntervention) -> dict[str, Any]:
    """The plan's summary with what came of it: the strengths of the forward passes made instead of those
    predicted; `clipped`: at how many layers a limit made it smaller."""
    lowered = _lowered(request, one)
    applied = any(push.applied.positions for push in one.pushes)
    notes = [note for note in one.summary["notes"] if note not in BEFOREHAND]
    if not applied and not any(note.endswith(NOT_APPLIED) for note in notes):
        notes.append(
            "nothing was changed: a limit on KL left nothing of it"
            if lowered
            else "nothing was changed: no position of the scope needed it, or none was there while the schedule pushed"
        )
    if any(_held(push) for push in one.pushes):
        notes.append(
            f"the latent was not set everywhere: a push is held to {LARGEST_LATENT:g} times the norm of the state"
        )
    gains = one.pushes[0].applied.gains if one.pushes else []
    strength = one.summary.get("came_to", one.summary)["strength"]
    return {
        **{name: value for name, value in one.summary.items() if name not in PLANNED},
        "applied": applied,
        "strength_per_step": [round(strength * gain, 6) for gain in gains],
        "sites": [_site(push, site) for push, site in zip(one.pushes, one.summary["sites"], strict=False)],
        "clipped": sum(push.applied.clipped > 0 or lowered for push in one.pushes),
        "notes": notes,
        # Where nothing is written nothing is read, and nothing decided.
        **({} if one.controller is None or not request.writes else one.controller.receipt()),
    }


def _held(push: Push) -> bool:
    """Tell if the bound on what sets a latent made a push smaller: it was as large as that lets it be."""
    done = push.applied
    return push.sets_latent and done.clipped > 0 and done.ratio_max >= LARGEST_LATENT * (1 - 1e-3)


def _site(push: Push, site: dict[str, Any]) -> dict[str, Any]:
    done = push.applied
    return {
        **site,
        "positions_touched": done.positions,
        "positions_clipped": done.clipped,
        "steps_touched": done.steps,
        "delta_ratio_mean": done.ratio_sum / done.positions if done.positions else 0.0,
        "delta_ratio_max": done.ratio_max,
    }
