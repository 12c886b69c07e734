"""How hard an intervention pushes: units to hidden units, or to those of a feature's activation."""

import math
from collections.abc import Sequence

from torch import Tensor

from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import FeatureRef, Intervention
from steerserve.errors import RequestError
from steerserve.steering.attribute import Attribute
from steerserve.steering.names import UNITS
from steerserve.steering.operators import PURE_NUMBERS, SETS_LATENT
from steerserve.steering.push import Push

LARGEST: dict[str, float] = {"residual": 100.0, "max_act": 1000.0, "raw": 1e6, "stored": 1e4, "kl": 100.0}
"""Largest strength by unit: far beyond any text, well inside float32."""


def checked_strength(one: Intervention, attribute: Attribute | None, unit: str, param: str) -> float:
    """The strength of an intervention in `unit`, its attribute's own where it names none; raises RequestError."""
    if unit not in UNITS:
        raise RequestError(f"unit must be one of {list(UNITS)}, got {unit!r}", f"{param}.unit")
    if one.op in PURE_NUMBERS and one.unit is not None:
        raise RequestError(f"op {one.op!r} takes a factor; leave unit out, got {one.unit!r}", f"{param}.unit")
    strength = one.strength
    if strength is None:
        if attribute is None or one.op != "add" or unit != attribute.unit:
            raise RequestError(
                "strength is required here; only add of an attribute in its own unit has a default", f"{param}.strength"
            )
        strength = -attribute.strength if one.negate else attribute.strength
    elif one.negate:
        raise RequestError(
            f"negate turns an attribute's own strength round; write the sign into strength, got {strength:g}",
            f"{param}.negate",
        )
    if not math.isfinite(strength) or abs(strength) > LARGEST[unit]:
        raise RequestError(
            f"strength must be finite and within +-{LARGEST[unit]:g} here, got {strength}",
            f"{param}.strength",
        )
    return float(strength)


def from_kl(density: Tensor, nats: float) -> float:
    """The strength in an attribute's own unit whose uniform push is predicted to cost so many nats a response token,
    with the sign given: sign(s) sqrt(2 |s| / sum c). density: its calibrated cost, as `token_cost` gives it."""
    return math.copysign(math.sqrt(2 * abs(nats) / float(density.mean())), nats)


def checked_kl(density: Tensor, attribute: Attribute, nats: float, param: str) -> None:
    """Raise RequestError for nats that take too large a strength in the attribute's own unit."""
    strength = from_kl(density, nats)
    if abs(strength) > LARGEST[attribute.unit]:
        raise RequestError(
            f"{nats:g} nats a token are a strength of {strength:.4g} {attribute.unit}; at most "
            f"{LARGEST[attribute.unit]:g} is taken",
            param,
        )


def known_unit(catalogue: Catalogue, one: Intervention, pushes: Sequence[Push]) -> str:
    """The unit of a feature or vector where the request names none: the first that is known for it."""
    if one.feature is not None and catalogue.saes[one.feature.sae].stats is not None:
        return "max_act"
    if all(push.layer in catalogue.residual_norms for push in pushes):
        return "residual"
    return "stored" if one.vector is not None and one.vector.name is not None else "raw"


def scale_of(
    catalogue: Catalogue, attribute: Attribute | None, push: Push, unit: str, one: Intervention, param: str
) -> float:
    """What strength 1 is at a push's site: hidden units or, of a feature that is clamped or capped, units of its
    activation.

    An activation of 1 is as many hidden units as the feature's decoder row is long, so that `max_act`, `residual` and
    `stored` mean the same of a feature for every operator. `raw` is the units themselves.
    """
    if unit == "raw":
        return 1.0
    if one.feature is None:
        return _hidden_units(catalogue, attribute, push, unit, one, param)
    row = catalogue.saes[one.feature.sae].row_norm(one.feature.index)
    if unit == "max_act":
        largest = _largest_activation(catalogue, push, one.feature, param)
        return largest if one.op in SETS_LATENT else largest * row
    hidden = row if unit == "stored" else _hidden_units(catalogue, attribute, push, unit, one, param)
    return hidden / row if one.op in SETS_LATENT else hidden


def _hidden_units(
    catalogue: Catalogue, attribute: Attribute | None, push: Push, unit: str, one: Intervention, param: str
) -> float:
    if unit == "stored":
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
    raise RequestError("unit 'max_act' is for a feature; use 'residual' or 'raw'", param)


def _largest_activation(catalogue: Catalogue, push: Push, feature: FeatureRef, param: str) -> float:
    stats = catalogue.saes[feature.sae].stats
    if stats is None:
        known = "'residual' or 'raw'" if push.layer in catalogue.residual_norms else "'raw'"
        raise RequestError(
            f"sae {feature.sae!r} has no feature_stats.safetensors, so max_act is not known; use {known}", param
        )
    largest = float(stats.max_act[feature.index])
    if largest <= 0.0:
        raise RequestError(
            f"feature {feature.index} of sae {feature.sae!r} was never active; use 'residual' or 'raw'",
            param,
        )
    return largest
