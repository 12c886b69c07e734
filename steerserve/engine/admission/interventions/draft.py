"""An intervention checked against the catalogue: its directions, strength, scope and schedule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from steerserve.engine.admission.catalogue import Catalogue, CompiledSchedule
from steerserve.engine.admission.conditions import closed_loop, govern
from steerserve.engine.admission.interventions.cost import token_cost, why_no_cost
from steerserve.engine.admission.interventions.sites import attribute_sites, feature_site, vector_sites
from steerserve.engine.admission.interventions.units import (
    checked_kl,
    checked_strength,
    from_kl,
    known_unit,
    scale_of,
)
from steerserve.engine.api.params import SLICES, Choice, Intervention
from steerserve.engine.request.controllers import FeedbackLoop, InterventionController
from steerserve.engine.request.kl_budget import InterventionCost
from steerserve.errors import RequestError, RevisionError
from steerserve.steering.attribute import Attribute
from steerserve.steering.bounds import Bound
from steerserve.steering.names import NEUTRAL, Control
from steerserve.steering.operators import PURE_NUMBERS, SETS_VALUE
from steerserve.steering.push import SCOPES, Push


@dataclass(frozen=True, eq=False)
class InterventionDraft:
    """One checked intervention on its way to its pushes. A step of the way returns a new draft and changes none.

    `size` is the only number: the strengths of the pushes, the cost and what the plan says are worked out from it in
    `resolve`.
    """

    asked: Intervention
    param: str
    """Its path among the row's fields."""
    attribute: Attribute | None
    pushes: tuple[Push, ...]
    """What is pushed at each layer. Their strengths are those of a `push_size` of 1, in the units of `Push.strength`;
    their gains are not set."""
    unit: str
    size: float
    """How hard it pushes, in `unit`."""
    scope: str | tuple[int, int]
    """As asked."""
    schedule: Choice
    density: Tensor | None
    """The calibrated cost of its attribute, as `token_cost` gives it; None where there is none."""
    why_no_cost: str | None
    """Why that cost does not hold for what it pushes; None: it does."""
    compiled: CompiledSchedule | None = None
    """Its gains; None until its schedule is compiled."""
    control: Control | None = None
    """The control that was put in its place."""
    picked: Mapping[int, str] = field(default_factory=dict)
    """By layer, the feature whose direction a control took."""
    bound: Bound | None = None
    """The most that its pushes and others may change a state."""
    loop: FeedbackLoop | None = None
    controller: InterventionController | None = None
    """What decides about it while the row runs; None where its schedule alone does."""

    @property
    def neutral(self) -> bool:
        """Tell if it changes nothing whatever the gains."""
        return self.size == NEUTRAL.get(self.asked.op)

    @property
    def push_size(self) -> float:
        """Its size in the unit that pushes add up in: the attribute's own where `unit` is `kl`."""
        if self.unit != "kl":
            return self.size
        assert self.density is not None
        return from_kl(self.density, self.size)

    @property
    def own_strength(self) -> float | None:
        """Its size in the attribute's own unit, at every layer; None where there is no such number."""
        if self.attribute is None or self.asked.op != "add":
            return None
        return _own_strength(self.attribute, self.pushes, self.push_size)

    def cost(self, scale: float = 1.0) -> InterventionCost | None:
        """The predicted KL of its pushes multiplied by scale; None where no calibrated cost holds for it."""
        if self.why_no_cost is not None:
            return None
        assert self.attribute is not None and self.density is not None and self.own_strength is not None
        return InterventionCost(self.attribute.name, self.density, self.own_strength * scale)


def draft(
    catalogue: Catalogue, one: Intervention, response: tuple[int, int], guided: bool, param: str
) -> InterventionDraft:
    """One intervention against the catalogue; raises RequestError.

    response is the canvas span of the response; guided: whether classifier-free guidance is on, for which no cost was
    calibrated.
    """
    named = [name for name in ("attribute", "feature", "vector") if getattr(one, name) is not None]
    if len(named) != 1:
        got = " and ".join(named) or "none of them"
        raise RequestError(f"an intervention names exactly one of attribute, feature and vector, got {got}", param)
    attribute = catalogue.attribute(one.attribute, f"{param}.attribute") if one.attribute is not None else None
    if attribute is not None and one.sha256 is not None and not attribute.sha256.startswith(one.sha256):
        here = f"{attribute.name}@{attribute.sha256[:12]}"
        raise RevisionError(f"no revision {one.sha256} of the attribute here; this is {here}", f"{param}.attribute")
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
    why = why_no_cost(catalogue, attribute, one, scope)
    why = "costs were calibrated without guidance (cfg_scale 0)" if guided and why is None else why
    if unit == "kl" and why is not None:
        raise RequestError(f"unit 'kl' needs a calibrated cost: {why}", f"{param}.unit")
    size = checked_strength(one, attribute, unit, param)
    known = catalogue.compiled.profile(attribute) if attribute is not None else None
    density = token_cost(catalogue, attribute) if attribute and known is not None and known.cost is not None else None
    hidden = unit
    if unit == "kl":
        assert attribute is not None and density is not None
        checked_kl(density, attribute, size, f"{param}.strength")
        hidden = attribute.unit
    on_response = _scope(scope, response, catalogue.facts.shift, param)
    factor = one.op in PURE_NUMBERS
    set_up = tuple(
        replace(
            push,
            op=one.op,
            scope=on_response,
            strength=1.0 if factor else scale_of(catalogue, attribute, push, hidden, one, f"{param}.unit"),
        )
        for push in pushes
    )
    schedule = default_schedule if one.schedule is None else one.schedule
    drafted = InterventionDraft(one, param, attribute, set_up, unit, size, scope, schedule, density, why)
    if why is None and drafted.own_strength is None:
        why = "costs were calibrated for pushes of one strength, in the attribute's own unit, at all of its layers"
        return replace(drafted, why_no_cost=why)
    return drafted


def scheduled(catalogue: Catalogue, drafted: InterventionDraft) -> InterventionDraft:
    """The draft with the schedule that it asks for, compiled; of a closed loop the most that it may push. Raises
    RequestError."""
    op, param, attribute = drafted.asked.op, f"{drafted.param}.schedule", drafted.attribute
    profile = None if attribute is None else catalogue.compiled.profile(attribute)
    loop = closed_loop(drafted.schedule, attribute, op, drafted.push_size, profile, drafted.param)
    if loop is not None:
        most = CompiledSchedule(loop.bound(SLICES), (loop.config.peak,) * SLICES)
        return replace(drafted, loop=loop, compiled=most)
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
    return replace(drafted, compiled=compiled)


def governed(catalogue: Catalogue, drafted: InterventionDraft) -> InterventionDraft:
    """The draft with what decides about it while the row runs; raises RequestError."""
    return replace(drafted, controller=govern(catalogue, drafted.loop, drafted.asked.when, drafted.param))


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


def _own_strength(attribute: Attribute, pushes: Sequence[Push], size: float) -> float | None:
    units = [attribute.sites[push.layer].residual_norm if attribute.unit == "residual" else 1.0 for push in pushes]
    found = [size * push.strength / unit for push, unit in zip(pushes, units, strict=True)]
    same = max(found) - min(found) <= 1e-6 * max(map(abs, found))
    return found[0] if same else None
