"""Resolve interventions: names to directions, units to hidden units, schedules to tables of gains."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from schedulers import GainTable
from steerserve.engine.admission.catalogue import Catalogue, CompiledSchedule
from steerserve.engine.admission.interventions.draft import InterventionDraft
from steerserve.engine.api.params import SLICES, Choice, FeatureRef, Intervention
from steerserve.engine.request.intervention import ActiveIntervention, AttributeReadout
from steerserve.errors import NotFoundError
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute
from steerserve.steering.names import NEUTRAL
from steerserve.steering.operators import PURE_NUMBERS, READS_LATENT, READS_PAIR, SETS_LATENT
from steerserve.steering.push import Applied, Push

NOT_APPLIED: Final = ": not applied"
"""How a note ends that says beforehand why nothing is pushed."""


def resolve(
    catalogue: Catalogue, drafted: InterventionDraft, progress: Sequence[float] | None, scale: float = 1.0
) -> ActiveIntervention:
    """An intervention with its pushes, its cost and what the plan says of it, all worked out from the draft's size.

    progress is that of each step, None where it depends on the model; the limit on the predicted KL multiplies the
    pushes by scale.
    """
    one, compiled, loop, controller = drafted.asked, drafted.compiled, drafted.loop, drafted.controller
    assert compiled is not None
    table, size = compiled.table, drafted.push_size * scale
    # Nats go with the square of the push.
    strength = drafted.size * (scale**2 if drafted.unit == "kl" else scale)
    pushes = [
        replace(
            push,
            strength=drafted.push_size * push.strength * scale,
            gains=table.gains,
            within=table.within,
            override=None if controller is None else controller.override,
            bound=drafted.bound,
            applied=Applied(),
        )
        for push in drafted.pushes
    ]
    predicted, never = None, False
    if progress is not None and controller is None:
        gains = table.at(torch.tensor(progress, dtype=torch.float64)).tolist()
        predicted = [round(size * gain, 6) for gain in gains]
        never = not any(gains) and not drafted.neutral
    scope = drafted.scope
    summary = {
        "name": _name(one),
        "operator": one.op,
        "direction": one.direction if drafted.attribute else "sae" if one.feature else "vector",
        "strength": strength,
        "unit": "factor" if one.op in PURE_NUMBERS else drafted.unit,
        **_came_to(drafted, size),
        "neutral": drafted.neutral,
        "peak": _peak(drafted, compiled, strength),
        **({} if drafted.control is None else {"control": drafted.control}),
        "scope": list(scope) if isinstance(scope, tuple) else scope,
        "schedule": _shown(drafted.schedule) | {"norm": table.norm, "gains": [round(g, 6) for g in compiled.gains]}
        if loop is None
        else loop.schedule_json(),
        "strength_per_step": predicted,
        "rho": table.rho,
        "sites": [
            {
                "layer": push.layer,
                **_strength_at(push),
                "sae_sha256": _sae_hash(drafted.attribute, push),
                **({"control_feature": drafted.picked[push.layer]} if drafted.picked else {}),
            }
            for push in pushes
        ],
        "attribute_sha256": drafted.attribute.sha256 if drafted.attribute else None,
        "vector_sha256": _vector_hash(catalogue, one),
        "notes": [
            *([table.note] if table.note else []),
            *_never_better(table),
            *(_never_read(pushes[0]) if one.feature is not None else []),
            *([f"strength {strength:g} changes nothing{NOT_APPLIED}"] if drafted.neutral else []),
            *([f"no step falls where the schedule pushes{NOT_APPLIED}"] if never else []),
            *([] if controller is None else controller.notes(size)),
        ],
    }
    if one.when is not None:
        summary["when"] = one.when
    active, controller = ((), None) if drafted.neutral else (tuple(pushes), controller)
    return ActiveIntervention(summary, active, controller, drafted.cost(scale), one.mandatory)


def _peak(drafted: InterventionDraft, compiled: CompiledSchedule, strength: float) -> float | None:
    """The largest |strength| that the schedule reaches, in the draft's unit; for multiply, its distance from doing
    nothing. None where the run decides."""
    if drafted.loop is not None:
        return None
    most = max(abs(gain) for gain in compiled.gains)
    # Nats go with the square of the push.
    return abs(strength - NEUTRAL.get(drafted.asked.op, 0.0)) * (most**2 if drafted.unit == "kl" else most)


def readout(catalogue: Catalogue, name: str, param: str) -> AttributeReadout:
    """A reading of an attribute at the first of its layers, over the response."""
    attribute = catalogue.attribute(name, param)
    layer = attribute.layers[0]
    push = Push(layer, attribute.directions[layer, "sae"], "read", 0.0, torch.zeros(SLICES), "response")
    return AttributeReadout(name, push, attribute.sites[layer].residual_norm)


def feature_readout(catalogue: Catalogue, feature: FeatureRef, param: str) -> AttributeReadout:
    """A reading of a feature's activation after the pushes at its SAE's layer, over the positions the SAE is for."""
    sae = catalogue.sae(feature.sae, f"{param}.sae")
    try:
        direction = sae.direction(feature.index).cpu()
    except NotFoundError as error:
        raise NotFoundError(str(error), f"{param}.index") from error
    scope = {"mask": "masked", "visible": "committed", None: "response"}[sae.facts.policy]
    push = Push(sae.facts.layer, direction, "read", 0.0, torch.zeros(SLICES), scope, sae=sae, feature=feature.index)
    return AttributeReadout(f"{feature.sae}:{feature.index}", push, 1.0)


def _came_to(drafted: InterventionDraft, size: float) -> dict[str, Any]:
    """What a strength in nats is in the attribute's own unit, by the cost that was calibrated: a prediction."""
    if drafted.unit != "kl" or drafted.attribute is None:
        return {}
    return {"came_to": {"strength": size, "unit": drafted.attribute.unit, "by": "predicted_kl"}}


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


def _never_read(push: Push) -> list[str]:
    """Note on the push of a feature where its encoder does not read the feature's own row, by which a latent is set,
    or reads it and leaves the feature out all the same."""
    if push.op not in READS_LATENT - READS_PAIR or not isinstance(push.sae, SparseAutoencoder):
        return []
    sae, feature = push.sae, push.feature
    assert feature is not None
    if not sae.reads_back(feature):
        return [
            f"the encoder of {sae.facts.id} reads {sae.own(feature):.3g} of feature {feature}'s own decoder row: what "
            f"is set is its part of the reconstruction, not what the encoder reads"
        ]
    if push.op == "clamp" and sae.lets_through(push.strength) and not sae.reached(feature):
        return [
            f"the {sae.facts.activation} of {sae.facts.id} leaves feature {feature} out however far its decoder row is "
            f"pushed, of which other features read more: what is set is what it would read if it were not"
        ]
    return []


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


def overlaps(interventions: Sequence[ActiveIntervention]) -> list[list[float]]:
    """Largest |cosine| between a direction of one and a direction of the other, for every pair, over all their layers.

    Between layers too: what is written to the residual stream at one layer can be taken out of it at a later one.
    Interventions without a push overlap with none.
    """
    directions = [push.direction for one in interventions for push in one.pushes]
    found = [[0.0] * len(interventions) for _ in interventions]
    if not directions:
        return found
    stacked = torch.stack(directions).double()
    cosines = (stacked @ stacked.T).abs().tolist()
    owner = [index for index, one in enumerate(interventions) for _ in one.pushes]
    for row, i in zip(cosines, owner, strict=True):
        for cosine, j in zip(row, owner, strict=True):
            found[i][j] = max(found[i][j], cosine)
    return found
