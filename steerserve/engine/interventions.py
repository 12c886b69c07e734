"""Resolve interventions: names to directions, units to hidden units, schedules to tables of gains."""

from collections.abc import Sequence
from typing import Any

import torch

from schedulers import GainTable
from steerserve.engine.api.params import SLICES, Choice, FeatureRef, Intervention
from steerserve.engine.catalogue import Catalogue
from steerserve.engine.compiled import CompiledSchedule
from steerserve.engine.cost import Price, density, unpriced
from steerserve.engine.directions import attribute_sites, feature_site, vector_sites
from steerserve.engine.drafts import Draft
from steerserve.engine.feedback import closed_loop
from steerserve.engine.resolved import Readout, Resolved
from steerserve.engine.strengths import checked_strength, from_kl, known_unit, scale_of
from steerserve.errors import NotFoundError, RequestError
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute
from steerserve.steering.operators import PURE_NUMBERS, READS_LATENT, READS_PAIR, SETS_LATENT, SETS_VALUE
from steerserve.steering.push import SCOPES, Push


def draft(catalogue: Catalogue, one: Intervention, response: tuple[int, int], guided: bool, param: str) -> Draft:
    """One intervention against the catalogue; raises RequestError.

    response is the canvas span of the response; guided: whether classifier-free guidance is on, for which no cost was
    calibrated.
    """
    named = [name for name in ("attribute", "feature", "vector") if getattr(one, name) is not None]
    if len(named) != 1:
        got = " and ".join(named) or "none of them"
        raise RequestError(f"an intervention names exactly one of attribute, feature and vector, got {got}", param)
    attribute = catalogue.attribute(one.attribute, f"{param}.attribute") if one.attribute is not None else None
    default_schedule: Choice = "uniform"
    default_scope = "masked"
    if attribute is not None:
        pushes = attribute_sites(attribute, one, param)
        default_unit = attribute.unit if one.op == "add" else "residual"
        default_scope = attribute.scope
        # A schedule says when to push; an operator that sets or removes a projection holds it throughout.
        default_schedule = "uniform" if one.op in SETS_VALUE else attribute.schedule
    elif one.feature is not None:
        pushes = [feature_site(catalogue, one, param)]
        default_unit = known_unit(catalogue, one, pushes)
    else:
        pushes = vector_sites(catalogue, one, param)
        default_unit = known_unit(catalogue, one, pushes)
    # Against None and not by truth: an empty name is a wrong name, not a missing one.
    unit = default_unit if one.unit is None else one.unit
    if attribute is None and one.direction != "sae":
        raise RequestError(
            f"direction {one.direction!r} is a choice of an attribute; leave it out", f"{param}.direction"
        )
    scope = default_scope if one.scope is None else one.scope
    why = unpriced(catalogue, attribute, one, scope)
    why = "costs were calibrated without guidance (cfg_scale 0)" if guided and why is None else why
    if unit == "kl" and why is not None:
        raise RequestError(f"unit 'kl' needs a calibrated cost: {why}", f"{param}.unit")
    strength = size = checked_strength(one, attribute, unit, param)
    hidden = unit
    if unit == "kl":
        assert attribute is not None
        size, hidden = from_kl(catalogue, attribute, strength, f"{param}.strength"), attribute.unit
    on_response = _scope(scope, response, catalogue.facts.shift, param)
    for push in pushes:
        factor = one.op in PURE_NUMBERS
        scale = 1.0 if factor else scale_of(catalogue, attribute, push, hidden, one, f"{param}.unit")
        push.strength, push.op, push.scope = size * scale, one.op, on_response
    own = None if attribute is None or one.op != "add" else _own_strength(attribute, pushes)
    price = None
    if why is None and attribute is not None and own is not None:
        price = Price(attribute.name, density(catalogue, attribute), own)
    elif why is None:
        why = "costs were calibrated for pushes of one strength, in the attribute's own unit, at all of its layers"
    schedule = default_schedule if one.schedule is None else one.schedule
    return Draft(one, param, attribute, pushes, unit, strength, size, scope, schedule, own, price, why)


def own_schedule(catalogue: Catalogue, drafted: Draft) -> CompiledSchedule:
    """The schedule that an intervention asks for, compiled; of a closed loop the most that it may push. Raises
    RequestError."""
    op, param, attribute = drafted.one.op, f"{drafted.param}.schedule", drafted.attribute
    profile = None if attribute is None else catalogue.compiled.profile(attribute)
    drafted.loop = closed_loop(drafted.schedule, attribute, op, drafted.size, profile, drafted.param)
    if drafted.loop is not None:
        return CompiledSchedule(drafted.loop.bound(SLICES), (drafted.loop.config.peak,) * SLICES)
    try:
        compiled = catalogue.compiled.schedule(drafted.schedule, drafted.attribute, op)
    except ValueError as error:
        raise RequestError(str(error), param) from error
    if op in SETS_VALUE and max(compiled.gains) > 1 + 1e-6:
        raise RequestError(
            f"op {op!r} takes gains of at most 1, norm {compiled.table.norm!r} makes {max(compiled.gains):.3g}; "
            f"use 'peak'",
            param,
        )
    return compiled


def resolve(
    catalogue: Catalogue, drafted: Draft, compiled: CompiledSchedule, progress: Sequence[float] | None
) -> Resolved:
    """A draft with its gains; progress is that of each step, None where it depends on the model."""
    one, table, loop, governor = drafted.one, compiled.table, drafted.loop, drafted.governor
    for push in drafted.pushes:
        push.gains, push.within, push.dial = table.gains, table.within, None if governor is None else governor.dial
    predicted = None
    if progress is not None and governor is None:
        gains = table.at(torch.tensor(progress, dtype=torch.float64)).tolist()
        predicted = [round(drafted.size * gain, 6) for gain in gains]
    never = predicted is not None and not any(predicted) and not drafted.neutral and one.op not in SETS_VALUE
    scope = drafted.scope
    summary = {
        "name": _name(one),
        "operator": one.op,
        "direction": one.direction if drafted.attribute else "sae" if one.feature else "vector",
        "strength": drafted.strength,
        "unit": "factor" if one.op in PURE_NUMBERS else drafted.unit,
        **_came_to(drafted),
        **drafted.control,
        "scope": list(scope) if isinstance(scope, tuple) else scope,
        "schedule": _shown(drafted.schedule) | {"norm": table.norm, "gains": [round(g, 6) for g in compiled.gains]}
        if loop is None
        else loop.told(),
        "strength_per_step": predicted,
        "rho": table.rho,
        "sites": [
            {
                "layer": push.layer,
                **_strength_at(push),
                "sae_sha256": _sae_hash(drafted.attribute, push),
                **({"control_feature": drafted.picked[push.layer]} if drafted.picked else {}),
            }
            for push in drafted.pushes
        ],
        "attribute_sha256": drafted.attribute.sha256 if drafted.attribute else None,
        "vector_sha256": _vector_hash(catalogue, one),
        "notes": [
            *([table.note] if table.note else []),
            *_never_better(table),
            *_never_read(drafted),
            *([f"strength {drafted.strength:g} changes nothing: not applied"] if drafted.neutral else []),
            *(["no step falls where the schedule pushes: not applied"] if never else []),
            *([] if governor is None else governor.notes(drafted.size)),
        ],
    }
    if one.when is not None:
        summary["when"] = one.when
    pushes, governor = ((), None) if drafted.neutral else (tuple(drafted.pushes), governor)
    return Resolved(summary, pushes, governor, drafted.price, one.mandatory)


def readout(catalogue: Catalogue, name: str, param: str) -> Readout:
    """A reading of an attribute at the first of its layers, over the response."""
    attribute = catalogue.attribute(name, param)
    layer = attribute.layers[0]
    push = Push(layer, attribute.directions[layer, "sae"], "read", 0.0, torch.zeros(SLICES), "response")
    return Readout(name, push, attribute.sites[layer].residual_norm)


def feature_readout(catalogue: Catalogue, feature: FeatureRef, param: str) -> Readout:
    """A reading of a feature's activation after the pushes at its SAE's layer, over the positions the SAE is for."""
    sae = catalogue.sae(feature.sae, f"{param}.sae")
    try:
        direction = sae.direction(feature.index).cpu()
    except NotFoundError as error:
        raise NotFoundError(str(error), f"{param}.index") from error
    scope = {"mask": "masked", "visible": "committed", None: "response"}[sae.facts.policy]
    push = Push(sae.facts.layer, direction, "read", 0.0, torch.zeros(SLICES), scope, sae=sae, feature=feature.index)
    return Readout(f"{feature.sae}:{feature.index}", push, 1.0)


def _scope(scope: str | tuple[int, int], response: tuple[int, int], shift: int, param: str) -> str | tuple[int, int]:
    """A checked scope; a span becomes that of the states which decide its tokens."""
    if isinstance(scope, str):
        if scope not in SCOPES:
            raise RequestError(f"scope must be one of {list(SCOPES)} or a span, got {scope!r}", f"{param}.scope")
        return scope
    first, last = scope
    if not 0 <= first < last <= response[1] - response[0]:
        raise RequestError(
            f"a span is [first, last + 1) of the response, 0 to {response[1] - response[0]}, got [{first}, {last}]",
            f"{param}.scope",
        )
    return max(0, response[0] + first - shift), max(1, response[0] + last - shift)


def _own_strength(attribute: Attribute, pushes: Sequence[Push]) -> float | None:
    """The strength of pushes in the attribute's own unit; None where it is not the same at all of them."""
    units = [attribute.sites[push.layer].residual_norm if attribute.unit == "residual" else 1.0 for push in pushes]
    found = [push.strength / unit for push, unit in zip(pushes, units, strict=True)]
    same = max(found) - min(found) <= 1e-6 * max(map(abs, found))
    return found[0] if same else None


def _came_to(drafted: Draft) -> dict[str, Any]:
    """What a strength in nats is in the attribute's own unit, by the cost that was calibrated: a prediction."""
    if drafted.unit != "kl" or drafted.attribute is None:
        return {}
    return {"came_to": {"strength": drafted.size, "unit": drafted.attribute.unit, "by": "predicted_kl"}}


def _never_better(table: GainTable) -> list[str]:
    if table.rho is None or table.rho >= 1 + 1e-9:
        return []
    return ["rho is 1: this attribute gains nothing from a schedule"]


def _strength_at(push: Push) -> dict[str, Any]:
    """A push's strength in hidden units and, where it sets a feature's latent, in units of its activation."""
    if not isinstance(push.sae, SparseAutoencoder) or push.feature is None or push.op not in SETS_LATENT:
        return {"strength_hidden": push.strength}
    return {
        "strength_hidden": push.strength * push.sae.row_norm(push.feature),
        "strength_activation": push.strength,
    }


def _never_read(drafted: Draft) -> list[str]:
    """A note where an encoder does not read the feature's own row, by which a latent is set."""
    [push] = drafted.pushes if drafted.one.feature is not None else [None]
    if push is None or push.op not in READS_LATENT - READS_PAIR or not isinstance(push.sae, SparseAutoencoder):
        return []
    assert push.feature is not None
    if push.sae.reads_back(push.feature):
        return []
    return [
        f"the encoder of {push.sae.facts.id} reads {push.sae.own(push.feature):.3g} of feature {push.feature}'s own "
        f"decoder row: what is set is its part of the reconstruction, not what the encoder reads"
    ]


def _vector_hash(catalogue: Catalogue, one: Intervention) -> str | None:
    name = one.vector.name if one.vector is not None else None
    return None if name is None else catalogue.vectors[name].sha256


def _name(one: Intervention) -> str:
    if one.feature is not None:
        return f"{one.feature.sae}:{one.feature.index}"
    return one.attribute or (one.vector.name if one.vector else None) or "vector"


def _sae_hash(attribute: Attribute | None, push: Push) -> str | None:
    if attribute is not None:
        return attribute.sites[push.layer].sae_sha256
    return push.sae.facts.sha256 if isinstance(push.sae, SparseAutoencoder) else None


def _shown(choice: Choice) -> dict[str, Any]:
    return {"type": choice} if isinstance(choice, str) else dict(choice)
