"""What the interventions of a row come to together: one allocation, limits, controls, and what all of it costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerserve.engine.api.params import GenerationParams, Limits
from steerserve.engine.budget import PredictedBudget
from steerserve.engine.catalogue import Catalogue
from steerserve.engine.compiled import CompiledSchedule
from steerserve.engine.controls import put_control
from steerserve.engine.cost import Bill, along, bill, course
from steerserve.engine.drafts import Draft
from steerserve.engine.governor import govern
from steerserve.engine.interventions import draft, own_schedule, resolve
from steerserve.engine.joint import joint_schedules
from steerserve.engine.limits import check_limits, scale_to, set_bound
from steerserve.engine.resolved import Resolved
from steerserve.errors import RequestError
from steerserve.steering.names import COMBINE, CONTROLS

Scheduled = list[tuple[Draft, CompiledSchedule]]


@dataclass(frozen=True, eq=False)
class Allocation:
    """A row's interventions, resolved."""

    interventions: tuple[Resolved, ...]
    budget: PredictedBudget | None
    told: dict[str, Any]
    """What the plan says of them together."""


def allocate(
    catalogue: Catalogue,
    params: GenerationParams,
    response: tuple[int, int],
    progress: Sequence[float] | None,
    rewrites: bool = False,
) -> Allocation:
    """The interventions of a row; raises RequestError and NotFoundError.

    response is the canvas span of the response; progress is that before each step, None where it depends on the model;
    rewrites: whether tokens may be committed more than once. What is not the caller's own has its own schedule, and is
    neither limited nor put under control.
    """
    limits = params.limits or Limits()
    check_limits(limits)
    _check_choices(catalogue, params, limits)
    drafts = [
        draft(catalogue, one, response, params.cfg_scale > 0, f"interventions[{i}]")
        for i, one in enumerate(params.interventions)
    ]
    own = [drafted for drafted in drafts if not drafted.one.mandatory]
    joint: dict[str, Any] | None = None
    compiled: dict[int, CompiledSchedule] = {}
    if params.combine == "joint" and own:
        together, joint = joint_schedules(catalogue, own)
        compiled = {id(drafted): one for drafted, one in zip(own, together, strict=True)}
    scheduled = [(one, compiled.get(id(one)) or own_schedule(catalogue, one)) for one in drafts]
    for drafted in drafts:
        drafted.governor = govern(catalogue, drafted.loop, drafted.one.when, drafted.param)
    mine = [(one, schedule) for one, schedule in scheduled if not one.one.mandatory and not one.neutral]
    scale = _keep_within(catalogue, limits, mine, progress)
    set_bound(own, limits)
    if params.control is not None:
        for index, drafted in enumerate(drafts):
            if not drafted.one.mandatory:
                put_control(catalogue, drafted, params.control, params.seed, index)
    resolved = [resolve(catalogue, one, schedule, progress) for one, schedule in scheduled]
    for (drafted, schedule), done in zip(scheduled, resolved, strict=True):
        alone, _ = predicted(catalogue, [] if drafted.neutral else [(drafted, schedule)], progress)
        done.summary["predicted_kl"] = None if rewrites else alone
        done.summary["notes"] += _about_prediction(drafted, alone, rewrites)
    total, whole = predicted(catalogue, mine, progress)
    if limits.max_predicted_kl is not None and total is not None:
        # Held while it runs, whatever the run decides and however often a token is written.
        total = limits.max_predicted_kl if rewrites else min(total, limits.max_predicted_kl)
    elif rewrites and mine:
        total = None
    told = {
        "combine": params.combine,
        "joint": joint,
        "control": params.control,
        "limits": None if params.limits is None else told_limits(limits) | {"predicted_kl_scale": scale},
        "measure_kl": params.measure_kl,
        "predicted_kl": total,
        "predicted_kl_cross_terms": None if whole is None else whole.cross,
    }
    return Allocation(tuple(resolved), _budget(limits, mine, whole, None if rewrites else progress), told)


def told_limits(limits: Limits) -> dict[str, Any]:
    """Limits as JSON; `holds`: what each limit on KL is held on."""
    held = {"max_kl": "measured_kl", "max_predicted_kl": "predicted_kl"}
    return asdict(limits) | {"holds": {name: what for name, what in held.items() if getattr(limits, name) is not None}}


def predicted(
    catalogue: Catalogue, scheduled: Scheduled, progress: Sequence[float] | None
) -> tuple[float | None, Bill | None]:
    """Nats a response token that interventions are predicted to cost together, and their bill; None where the cost of
    one is not known, and no bill also where there are none."""
    prices = [drafted.price for drafted, _ in scheduled if drafted.price is not None]
    if len(prices) < len(scheduled):
        return None, None
    whole = bill(catalogue, prices)
    if whole is None:
        return 0.0, None
    gains = along(progress, [schedule.table for _, schedule in scheduled])
    return whole.over(course(progress), gains)[1], whole


def _about_prediction(drafted: Draft, alone: float | None, rewrites: bool) -> list[str]:
    if alone is None:
        return [f"no predicted KL: {drafted.unpriced}"]
    if rewrites and not drafted.neutral:
        return ["no predicted KL: tokens may be written more than once"]
    return [] if drafted.governor is None else ["the predicted KL is that of the most it may push"]


def _keep_within(catalogue: Catalogue, limits: Limits, mine: Scheduled, progress: Sequence[float] | None) -> float:
    """Scale interventions to the limit on predicted KL; the factor, 1 or less."""
    if limits.max_predicted_kl is None:
        return 1.0
    for drafted, _ in mine:
        if drafted.price is None:
            raise RequestError(
                f"max_predicted_kl needs calibrated costs, {drafted.param}: {drafted.unpriced}; max_kl is measured and "
                "needs none",
                "limits.max_predicted_kl",
            )
    if any(drafted.governor is not None for drafted, _ in mine):
        # What it comes to is up to the run, and so is what is left of it.
        return 1.0
    total, _ = predicted(catalogue, mine, progress)
    assert total is not None
    return scale_to(limits.max_predicted_kl, limits, [drafted for drafted, _ in mine], total)


def _budget(
    limits: Limits, mine: Scheduled, whole: Bill | None, progress: Sequence[float] | None
) -> PredictedBudget | None:
    if limits.max_predicted_kl is None:
        return None
    groups = tuple(tuple(drafted.pushes) for drafted, _ in mine)
    planned = None if progress is None else tuple(progress)
    return PredictedBudget(limits.max_predicted_kl, limits.on_exceed == "refuse", whole, groups, planned)


def _check_choices(catalogue: Catalogue, params: GenerationParams, limits: Limits) -> None:
    if params.combine not in COMBINE:
        raise RequestError(f"combine must be {' or '.join(COMBINE)}, got {params.combine!r}", "combine")
    if params.control is not None and params.control not in CONTROLS:
        raise RequestError(f"control must be one of {list(CONTROLS)}, got {params.control!r}", "control")
    if limits.max_predicted_kl is not None and params.control not in (None, "sign_flip"):
        raise RequestError(
            f"max_predicted_kl needs calibrated costs, which the directions of control {params.control!r} have not; "
            "max_kl is measured and needs none",
            "limits.max_predicted_kl",
        )
    for param, asked in (("measure_kl", params.measure_kl), ("limits.max_kl", limits.max_kl is not None)):
        name = param.rpartition(".")[2]
        if asked and params.cfg_scale > 0:
            raise RequestError(f"{name} is measured, for rows without guidance: leave cfg_scale out", param)
        if asked and catalogue.facts.parameterisation == "score":
            raise RequestError(
                f"{name} is measured, for models that predict tokens; {catalogue.facts.family} predicts ratios", param
            )
