"""Resolve interventions: names to directions, units to hidden units, schedules to tables of gains."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from steerserve.engine.catalogue import Catalogue
from steerserve.engine.compiled import SLICES, CompiledSchedule
from steerserve.engine.directions import attribute_sites, feature_site, vector_sites
from steerserve.engine.feedback import closed_loop
from steerserve.engine.governor import govern
from steerserve.engine.params import Choice, Intervention
from steerserve.engine.request import Readout, Resolved
from steerserve.errors import RequestError
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute
from steerserve.steering.operators import NEUTRAL, PURE_NUMBERS, SETS_PROJECTION
from steerserve.steering.plan import SCOPES, Push

LARGEST = {"residual": 100.0, "max_act": 1000.0, "raw": 1e6, "stored": 1e4}
"""Largest strength by unit: far beyond any text, well inside float32."""


def resolve(
    catalogue: Catalogue, one: Intervention, response: tuple[int, int], progress: Sequence[float] | None, param: str
) -> Resolved:
    """One intervention against the catalogue; raises RequestError.

    response is the canvas span of the response; progress is that of each step, None where it depends on the model.
    """
    named = [name for name in ("attribute", "feature", "vector") if getattr(one, name) is not None]
    if len(named) != 1:
        got = " and ".join(named) or "none of them"
        raise RequestError(f"an intervention names exactly one of attribute, feature and vector, got {got}", param)
    attribute = catalogue.attribute(one.attribute, f"{param}.attribute") if one.attribute is not None else None
    default_schedule: Choice = "uniform"
    default_scope, profile = "masked", None
    if attribute is not None:
        pushes = attribute_sites(attribute, one, param)
        default_unit = attribute.unit if one.op == "add" else "residual"
        default_scope = attribute.scope
        # A schedule says when to push; an operator that sets or removes a projection holds it throughout.
        default_schedule = "uniform" if one.op in SETS_PROJECTION else attribute.schedule
        profile = catalogue.compiled.profile(attribute)
    elif one.feature is not None:
        pushes = [feature_site(catalogue, one, param)]
        default_unit = _known_unit(catalogue, one, pushes)
    else:
        pushes = vector_sites(catalogue, one, param)
        default_unit = _known_unit(catalogue, one, pushes)
    # Against None and not by truth: an empty name is a wrong name, not a missing one.
    unit = default_unit if one.unit is None else one.unit
    if attribute is None and one.direction != "sae":
        raise RequestError(
            f"direction {one.direction!r} is a choice of an attribute; leave it out", f"{param}.direction"
        )
    if unit == "kl":
        raise RequestError(
            "unit 'kl' needs a calibrated cost, which nothing here has; use 'residual' or 'raw'", f"{param}.unit"
        )
    strength = _strength(one, attribute, unit, param)
    asked_scope = default_scope if one.scope is None else one.scope
    scope = _scope(asked_scope, response, catalogue.facts.shift, param)
    schedule = default_schedule if one.schedule is None else one.schedule
    loop = closed_loop(schedule, attribute, one.op, strength, profile, param)
    if loop is None:
        compiled = _gains(catalogue, schedule, attribute, one.op, f"{param}.schedule")
    else:
        compiled = CompiledSchedule(loop.bound(SLICES), (loop.config.peak,) * SLICES)
    table, gains = compiled.table, compiled.gains
    governor = govern(catalogue, loop, one.when, param)
    sites, built = [], []
    neutral = strength == NEUTRAL.get(one.op, 0.0) and one.op not in ("clamp", "cap")
    for push in pushes:
        scale = 1.0 if one.op in PURE_NUMBERS else _scale(catalogue, attribute, push, unit, one, f"{param}.unit")
        sites.append(
            {"layer": push.layer, "strength_hidden": strength * scale, "sae_sha256": _sae_hash(attribute, push)}
        )
        push.strength, push.op, push.scope, push.gains = strength * scale, one.op, scope, table.gains
        push.dial = None if governor is None else governor.dial
        built.append(push)
    predicted = None
    if progress is not None and governor is None:
        predicted = [round(strength * gains[_slice(p)], 6) for p in progress]
    never = predicted is not None and not any(predicted) and not neutral and one.op not in SETS_PROJECTION
    summary = {
        "name": _name(one),
        "operator": one.op,
        "direction": one.direction if attribute else "sae" if one.feature else "vector",
        "strength": strength,
        "unit": "factor" if one.op in PURE_NUMBERS else unit,
        "scope": list(asked_scope) if isinstance(asked_scope, tuple) else asked_scope,
        "schedule": _shown(schedule) | {"norm": table.norm, "gains": [round(gain, 6) for gain in gains]}
        if loop is None
        else loop.told(),
        "strength_per_step": predicted,
        "rho": table.rho,
        "sites": sites,
        "attribute_sha256": attribute.sha256 if attribute else None,
        "vector_sha256": _vector_hash(catalogue, one),
        "notes": [
            *([table.note] if table.note else []),
            *(
                ["rho is 1: this attribute gains nothing from a schedule"]
                if table.rho is not None and table.rho < 1 + 1e-9
                else []
            ),
            *([f"strength {strength:g} changes nothing: not applied"] if neutral else []),
            *(["no step falls where the schedule pushes: not applied"] if never else []),
            *([] if governor is None else governor.notes(strength)),
        ],
    }
    if one.when is not None:
        summary["when"] = one.when
    return Resolved(summary, () if neutral else tuple(built), None if neutral else governor)


def readout(catalogue: Catalogue, name: str, param: str) -> Readout:
    """A reading of an attribute at the first of its layers, over the response."""
    attribute = catalogue.attribute(name, param)
    layer = attribute.layers[0]
    push = Push(layer, attribute.directions[layer, "sae"], "read", 0.0, torch.zeros(SLICES), "response")
    return Readout(name, push, attribute.sites[layer].residual_norm)


def _strength(one: Intervention, attribute: Attribute | None, unit: str, param: str) -> float:
    if unit not in LARGEST:
        raise RequestError(f"unit must be one of {list(LARGEST)}, got {unit!r}", f"{param}.unit")
    if one.op in PURE_NUMBERS and one.unit is not None:
        raise RequestError(f"op {one.op!r} takes a factor; leave unit out, got {one.unit!r}", f"{param}.unit")
    strength = one.strength
    if strength is None:
        if attribute is None or one.op != "add" or unit != attribute.unit:
            raise RequestError(
                "strength is required here; only add of an attribute in its own unit has a default", f"{param}.strength"
            )
        strength = attribute.strength
    if not math.isfinite(strength) or abs(strength) > LARGEST[unit]:
        raise RequestError(
            f"strength must be finite and within +-{LARGEST[unit]:g} here, got {strength}",
            f"{param}.strength",
        )
    return float(strength)


def _known_unit(catalogue: Catalogue, one: Intervention, pushes: Sequence[Push]) -> str:
    """The unit of a feature or vector where the request names none: the first that is known for it."""
    if one.feature is not None and catalogue.saes[one.feature.sae].stats is not None:
        return "max_act"
    if all(push.layer in catalogue.residual_norms for push in pushes):
        return "residual"
    return "stored" if one.vector is not None and one.vector.name is not None else "raw"


def _scale(
    catalogue: Catalogue, attribute: Attribute | None, push: Push, unit: str, one: Intervention, param: str
) -> float:
    """Hidden units of strength 1 at a push's site."""
    if unit == "raw":
        return 1.0
    if unit == "stored":
        if one.feature is not None:
            return float(catalogue.saes[one.feature.sae].decoder_norm[one.feature.index])
        if one.vector is None or one.vector.name is None:
            raise RequestError(
                "unit 'stored' is for a feature or a vector given by name; use 'residual' or 'raw'", param
            )
        return catalogue.vector(one.vector.name, param).norms[push.layer]
    if unit == "residual" and attribute is not None:
        return attribute.sites[push.layer].residual_norm
    if unit == "residual":
        if push.layer not in catalogue.residual_norms:
            raise RequestError(f"no residual norm is known for layer {push.layer}; use unit 'raw'", param)
        return catalogue.residual_norms[push.layer]
    if one.feature is None:
        raise RequestError("unit 'max_act' is for a feature; use 'residual' or 'raw'", param)
    stats = catalogue.saes[one.feature.sae].stats
    if stats is None:
        known = "'residual' or 'raw'" if push.layer in catalogue.residual_norms else "'raw'"
        raise RequestError(
            f"sae {one.feature.sae!r} has no feature_stats.safetensors, so max_act is not known; use {known}", param
        )
    largest = float(stats.max_act[one.feature.index])
    if largest <= 0.0:
        raise RequestError(
            f"feature {one.feature.index} of sae {one.feature.sae!r} was never active; use 'residual' or 'raw'",
            param,
        )
    return largest


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


def _gains(catalogue: Catalogue, choice: Choice, attribute: Attribute | None, op: str, param: str) -> CompiledSchedule:
    try:
        compiled = catalogue.compiled.schedule(choice, attribute, op)
    except ValueError as error:
        raise RequestError(str(error), param) from error
    if op in SETS_PROJECTION and max(compiled.gains) > 1 + 1e-6:
        raise RequestError(
            f"op {op!r} takes gains of at most 1, norm {compiled.table.norm!r} makes {max(compiled.gains):.3g}; "
            f"use 'peak'",
            param,
        )
    return compiled


def _vector_hash(catalogue: Catalogue, one: Intervention) -> str | None:
    name = one.vector.name if one.vector is not None else None
    return None if name is None else catalogue.vectors[name].sha256


def _name(one: Intervention) -> str:
    if one.feature is not None:
        return f"{one.feature.sae}:{one.feature.index}"
    return one.attribute or (one.vector.name if one.vector else None) or "vector"


def _slice(progress: float) -> int:
    return min(int(progress * SLICES), SLICES - 1)


def _sae_hash(attribute: Attribute | None, push: Push) -> str | None:
    if attribute is not None:
        return attribute.sites[push.layer].sae_sha256
    return push.sae.facts.sha256 if isinstance(push.sae, SparseAutoencoder) else None


def _shown(choice: Choice) -> dict[str, Any]:
    return {"type": choice} if isinstance(choice, str) else dict(choice)
