"""What pushes cost: the predicted KL of a steered run from the unsteered one, in nats a response token.

A push of strength a (in its attribute's own unit) within slice k of K costs c_k a^2 / 2, c being the calibrated cost of
the attribute's profile, summed over the slices: each holds 1 / K of the tokens. So a token that commits at progress p
costs K c(p) a^2 / 2, and pushes of several attributes a^T K C(p) a / 2. Source: the additive decomposition of arXiv
2605.10971, appendix A.1, to second order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from schedulers import JointProfile
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import SLICES, Intervention
from steerserve.engine.request.kl_budget import CrossTerms, InterventionCost, TotalCost
from steerserve.steering.attribute import Attribute


def why_no_cost(catalogue: Catalogue, attribute: Attribute | None, one: Intervention, scope: object) -> str | None:
    """Why no calibrated cost holds for an intervention; None where one does."""
    if attribute is None:
        return "only attributes have a calibrated cost"
    profile = catalogue.compiled.profile(attribute)
    if profile is None or profile.cost is None:
        return f"attribute {attribute.name!r} has no calibrated cost"
    return uncalibrated(attribute, one, scope)


def uncalibrated(attribute: Attribute, one: Intervention, scope: object) -> str | None:
    """How an intervention differs from the pushes of its attribute that calibration measures; None where it does
    not."""
    if one.op != "add":
        return f"{attribute.name!r} was calibrated for op 'add', not {one.op!r}"
    if one.direction != "sae":
        return f"{attribute.name!r} was calibrated for direction 'sae', not {one.direction!r}"
    if one.layers is not None and set(one.layers) != set(attribute.layers):
        return f"{attribute.name!r} was calibrated at layers {list(attribute.layers)}"
    if scope != attribute.scope:
        return f"{attribute.name!r} was calibrated for scope {attribute.scope!r}"
    return None


def token_cost(catalogue: Catalogue, attribute: Attribute) -> Tensor:
    """K c [SLICES] of an attribute: a token that commits within a slice costs this times a^2 / 2 nats, a the push."""

    def make() -> Tensor:
        profile = catalogue.compiled.profile(attribute)
        cost = None if profile is None else profile.cost_on(SLICES)
        assert profile is not None and cost is not None
        return cost * profile.slices

    return catalogue.compiled.kept(attribute, "density", make)


def total_cost(catalogue: Catalogue, costs: Sequence[InterventionCost]) -> TotalCost | None:
    """What interventions cost together, with the joint profile's cross terms where it has them; None for none."""
    if not costs:
        return None
    names = tuple(dict.fromkeys(one.attribute for one in costs))
    member = torch.tensor([[float(one.attribute == name) for name in names] for one in costs], dtype=torch.float64)
    own = {one.attribute: one.density for one in costs}
    matrices = torch.diag_embed(torch.stack([own[name] for name in names], 1))
    joint = catalogue.joint
    known = [] if joint is None else [name for name in names if name in joint.names]
    if joint is not None and len(known) > 1:
        measured = joint_token_cost(catalogue, joint, tuple(known))
        at = torch.tensor([names.index(name) for name in known])
        matrices[:, at[:, None], at] = measured
    cross: CrossTerms = "all" if len(names) == 1 or len(known) == len(names) else "some" if len(known) > 1 else "none"
    return TotalCost(tuple(costs), member, matrices, cross)


def joint_token_cost(catalogue: Catalogue, joint: JointProfile, names: tuple[str, ...]) -> Tensor:
    """K C [SLICES, A, A] float64 of some of a joint profile's attributes."""
    return catalogue.compiled.kept(joint, names, lambda: joint.of(names).cost_on(SLICES) * joint.slices)
