"""An intervention checked against the catalogue: its directions, strength, scope and schedule."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from steerserve.engine.admission.catalogue import Catalogue, CompiledSchedule
from steerserve.engine.admission.conditions import closed_loop
from steerserve.engine.admission.interventions.cost import density, unpriced
from steerserve.engine.admission.interventions.sites import attribute_sites, feature_site, vector_sites
from steerserve.engine.admission.interventions.units import checked_strength, from_kl, known_unit, scale_of
from steerserve.engine.api.params import SLICES, Choice, Intervention
from steerserve.engine.request.controllers import Governor, Loop
from steerserve.engine.request.kl_budget import Price
from steerserve.errors import RequestError
from steerserve.steering.attribute import Attribute
from steerserve.steering.names import NEUTRAL
from steerserve.steering.operators import PURE_NUMBERS, SETS_VALUE
from steerserve.steering.push import SCOPES, Push


@dataclass(eq=False)
class Draft:
    """One intervention with its names resolved, before its gains are known."""

    one: Intervention
    param: str
    """Its path among the row's fields."""
    attribute: Attribute | None
    pushes: list[Push]
    """With their strengths in hidden units, or as `Push.strength` says."""
    unit: str
    strength: float
    """In `unit`."""
    size: float
    """The same in the unit that pushes add up in: the attribute's own where `unit` is `kl`."""
    scope: str | tuple[int, int]
    """As asked."""
    schedule: Choice
    own: float | None
    """In the attribute's own unit, at every layer; None where there is no such number."""
    price: Price | None
    unpriced: str | None
    """Why there is no price."""
    control: dict[str, Any] = field(default_factory=dict)
    """What the summary says of a control that was put in its place."""
    picked: dict[int, str] = field(default_factory=dict)
    """By layer, the feature whose direction a control took."""
    loop: Loop | None = None
    governor: Governor | None = None
    """What decides about it while the row runs; None where its schedule alone does."""

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing whatever the gains."""
        return self.strength == NEUTRAL.get(self.one.op)


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
