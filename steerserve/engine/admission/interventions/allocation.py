"""What the interventions of a row come to together: one allocation, limits, controls, and what all of it costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from schedulers import GainTable, JointTable, compile_joint
from steerserve.engine.admission.catalogue import Catalogue, CompiledSchedule
from steerserve.engine.admission.interventions.controls import controlled
from steerserve.engine.admission.interventions.cost import total_cost, uncalibrated
from steerserve.engine.admission.interventions.draft import InterventionDraft, draft, governed, scheduled
from steerserve.engine.admission.interventions.limits import bounded, check_limits, scale_to
from steerserve.engine.admission.interventions.resolve import resolve
from steerserve.engine.api.params import SLICES, GenerationParams, Limits
from steerserve.engine.request.intervention import ActiveIntervention
from steerserve.engine.request.kl_budget import (
    InterventionCost,
    PredictedBudget,
    TotalCost,
    gains_along,
    trajectory,
)
from steerserve.errors import RequestError
from steerserve.steering.names import COMBINE, CONTROLS


def jointly_scheduled(
    catalogue: Catalogue, drafts: Sequence[InterventionDraft]
) -> tuple[list[InterventionDraft], dict[str, Any]]:
    """The drafts of interventions that are allocated together, with their schedules compiled, and what the plan says of
    them; raises RequestError.

    The weights are those under which the strengths asked for are the best uniform mix, so that the gains move cost
    over progress and the rest is as asked. One intervention alone gets the optimal schedule.
    """
    profile = catalogue.joint
    if profile is None:
        raise RequestError(
            "combine 'joint' needs a joint profile (joint.json beside the attributes), and none is loaded", "combine"
        )
    names, strengths = [], []
    for drafted in drafts:
        name, strength = _member(drafted, profile.names)
        if name in names:
            raise RequestError(f"combine 'joint' takes an attribute once: {name!r}", f"{drafted.param}.attribute")
        names.append(name)
        strengths.append(strength)
    key = ("joint", tuple(names), tuple(strengths))

    def make() -> JointTable:
        return compile_joint(profile.of(names), strengths, slices=SLICES)

    try:
        table = catalogue.compiled.kept(profile, key, make)
    except ValueError as error:
        raise RequestError(f"combine 'joint': {error}", "combine") from error
    found = []
    for a, drafted in enumerate(drafts):
        gains = GainTable(table.gains[a], "kl", table.rho, table.note)
        compiled = CompiledSchedule(gains, tuple(gains.gains.tolist()))
        found.append(replace(drafted, schedule="joint", compiled=compiled))
    summary = {
        "attributes": names,
        "weights": [float(weight) for weight in table.weights],
        "rho": table.rho,
        "rho_attained": table.rho_attained,
        "note": table.note,
    }
    return found, summary


def _member(drafted: InterventionDraft, known: Sequence[str]) -> tuple[str, float]:
    """Name and strength, in its own unit, of an intervention that may be allocated."""
    one, param, attribute = drafted.asked, drafted.param, drafted.attribute
    if attribute is None:
        raise RequestError("combine 'joint' is for interventions by attribute", param)
    if attribute.name not in known:
        raise RequestError(
            f"the joint profile lacks {attribute.name!r}; it has {', '.join(known)}", f"{param}.attribute"
        )
    if one.schedule is not None:
        raise RequestError("combine 'joint' decides the schedule; leave it out", f"{param}.schedule")
    why = uncalibrated(attribute, one, drafted.scope)
    own = drafted.own_strength
    if why is not None or own is None:
        why = why or "its strength is not the same, in its own unit, at all of its layers"
        raise RequestError(f"combine 'joint' pushes attributes as they were calibrated: {why}", param)
    if own == 0:
        raise RequestError("combine 'joint' takes no strength of 0; leave the intervention out", f"{param}.strength")
    return attribute.name, own


REWRITTEN: Final = "no predicted KL: tokens may be written more than once"
MOST: Final = "the predicted KL is that of the most it may push"
BEFOREHAND: Final = frozenset({REWRITTEN, MOST})
"""Notes on what a plan predicts that are not true of a receipt, which has the cost of what was pushed."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """A row's interventions, resolved."""

    interventions: tuple[ActiveIntervention, ...]
    budget: PredictedBudget | None
    plan: dict[str, Any]
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
    joint: dict[str, Any] | None = None
    if params.combine == "joint":
        drafts, joint = _with_joint(catalogue, drafts)
    drafts = [scheduled(catalogue, one) if one.compiled is None else one for one in drafts]
    drafts = [bounded(governed(catalogue, one), limits) for one in drafts]
    limited = [not one.asked.mandatory and not one.neutral for one in drafts]
    mine = [one for one, held in zip(drafts, limited, strict=True) if held]
    scale = _scale_within(catalogue, limits, mine, progress)
    control = params.control
    if control is not None:
        drafts = [
            one if one.asked.mandatory else controlled(catalogue, one, control, params.seed, index)
            for index, one in enumerate(drafts)
        ]
    resolved = [
        resolve(catalogue, one, progress, scale if held else 1.0) for one, held in zip(drafts, limited, strict=True)
    ]
    for drafted, done in zip(drafts, resolved, strict=True):
        alone, _ = predicted(catalogue, [] if drafted.neutral else [done.cost], [_table(drafted)], progress)
        done.summary["predicted_kl"] = None if rewrites else alone
        done.summary["notes"] += _about_prediction(drafted, alone, rewrites)
    pushed = [done for done, held in zip(resolved, limited, strict=True) if held]
    tables = [_table(one) for one, held in zip(drafts, limited, strict=True) if held]
    total, whole = predicted(catalogue, [one.cost for one in pushed], tables, progress)
    if limits.max_predicted_kl is not None and total is not None:
        # Held while it runs, whatever the run decides and however often a token is written.
        total = limits.max_predicted_kl if rewrites else min(total, limits.max_predicted_kl)
    elif rewrites and pushed:
        total = None
    plan = {
        "combine": params.combine,
        "joint": joint,
        "control": params.control,
        "limits": None if params.limits is None else limits_json(limits) | {"predicted_kl_scale": scale},
        "measure_kl": params.measure_kl,
        "predicted_kl": total,
        "predicted_kl_cross_terms": None if whole is None else whole.cross,
    }
    return Allocation(tuple(resolved), _budget(limits, pushed, whole, None if rewrites else progress), plan)


def limits_json(limits: Limits) -> dict[str, Any]:
    """Limits as JSON; `holds`: what each limit on KL is held on."""
    held = {"max_kl": "measured_kl", "max_predicted_kl": "predicted_kl"}
    return asdict(limits) | {"holds": {name: what for name, what in held.items() if getattr(limits, name) is not None}}


def predicted(
    catalogue: Catalogue,
    costs: Sequence[InterventionCost | None],
    tables: Sequence[GainTable],
    progress: Sequence[float] | None,
) -> tuple[float | None, TotalCost | None]:
    """Nats a response token that interventions with these gains are predicted to cost together, and what makes them up;
    None where the cost of one is not known, and no total also where there are none."""
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None, None
    whole = total_cost(catalogue, known)
    if whole is None:
        return 0.0, None
    return whole.over(trajectory(progress), gains_along(progress, tables))[1], whole


def _with_joint(
    catalogue: Catalogue, drafts: Sequence[InterventionDraft]
) -> tuple[list[InterventionDraft], dict[str, Any] | None]:
    """The drafts with the caller's own allocated together, and what the plan says of these; None where there are
    none."""
    own = [one for one in drafts if not one.asked.mandatory]
    if not own:
        return list(drafts), None
    together, joint = jointly_scheduled(catalogue, own)
    done = iter(together)
    return [one if one.asked.mandatory else next(done) for one in drafts], joint


def _table(drafted: InterventionDraft) -> GainTable:
    assert drafted.compiled is not None
    return drafted.compiled.table


def _about_prediction(drafted: InterventionDraft, alone: float | None, rewrites: bool) -> list[str]:
    if alone is None:
        return [f"no predicted KL: {drafted.why_no_cost}"]
    if rewrites and not drafted.neutral:
        return [REWRITTEN]
    return [] if drafted.controller is None else [MOST]


def _scale_within(
    catalogue: Catalogue, limits: Limits, mine: Sequence[InterventionDraft], progress: Sequence[float] | None
) -> float:
    """The factor, 1 or less, with which interventions stay within the limit on predicted KL; raises RequestError."""
    if limits.max_predicted_kl is None:
        return 1.0
    for drafted in mine:
        if drafted.why_no_cost is not None:
            raise RequestError(
                f"max_predicted_kl needs calibrated costs, {drafted.param}: {drafted.why_no_cost}; max_kl is measured "
                "and needs none",
                "limits.max_predicted_kl",
            )
    if any(drafted.controller is not None for drafted in mine):
        # What it comes to is up to the run, and so is what is left of it.
        return 1.0
    total, _ = predicted(catalogue, [one.cost() for one in mine], [_table(one) for one in mine], progress)
    assert total is not None
    return scale_to(limits.max_predicted_kl, limits, total)


def _budget(
    limits: Limits, mine: Sequence[ActiveIntervention], whole: TotalCost | None, progress: Sequence[float] | None
) -> PredictedBudget | None:
    if limits.max_predicted_kl is None:
        return None
    groups = tuple(one.pushes for one in mine)
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
