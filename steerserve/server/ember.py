"""Goodfire Ember's `controller`, as its SDK serialises it, translated into interventions.

A DLM has no next token, so what Ember gates by one (`min_nudge_entropy`, ...) has no meaning here; scopes are
conditions on features. Both are refused. An intervention holds at every position of every step, as Ember's did.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from steerserve.engine.params import FeatureRef, Intervention, Operator, Unit
from steerserve.server import fields
from steerserve.server.fields import Name, Strength, Strict

MODES: Final[dict[str, tuple[Operator, Unit | None]]] = {
    "nudge": ("add", "max_act"),
    "pin": ("clamp", "max_act"),
    "mul": ("multiply", None),
}
"""Operator and unit of each mode. Ember's values are shares of a feature's largest activation; ours is the one measured
for the SAE that is loaded, and `clamp` sets the projection on the feature's direction."""


class EmberFeature(Strict):
    """A feature; only its index says which one it is."""

    uuid: str | None = Field(default=None, max_length=200)
    label: str | None = Field(default=None, max_length=1000)
    index_in_sae: int = Field(ge=0, le=fields.MAX_TOKEN_ID)
    max_activation_strength: float | None = None


class EmberFeatures(Strict):
    """A group of features, which get the same value."""

    features: list[EmberFeature] = Field(min_length=1, max_length=256)


class EmberIntervention(Strict):
    """One edit of a group of features."""

    mode: Literal["nudge", "pin", "mul"]
    features: EmberFeatures
    value: Strength


class EmberController(Strict):
    """The controller."""

    interventions: list[EmberIntervention] = Field(default=[], max_length=256)
    scopes: Annotated[Any, fields.neutral([])] = None
    name: str | None = Field(default=None, max_length=200)
    nonzero_strength_threshold: Annotated[Any, fields.neutral()] = None
    min_nudge_entropy: Annotated[Any, fields.neutral()] = None
    max_nudge_entropy: Annotated[Any, fields.neutral()] = None


class Ember(Strict):
    """A controller, and the SAE that its indices count in, which Ember's models had but one of."""

    sae: Name
    controller: EmberController

    def translate(self) -> list[tuple[Intervention, str]]:
        """Our interventions, each with the field it comes from."""
        return [
            (
                Intervention(
                    feature=FeatureRef(self.sae, feature.index_in_sae),
                    strength=one.value,
                    op=MODES[one.mode][0],
                    unit=MODES[one.mode][1],
                    scope="all",
                    schedule="uniform",
                ),
                f"controller.interventions[{i}].features.features[{k}]",
            )
            for i, one in enumerate(self.controller.interventions)
            for k, feature in enumerate(one.features.features)
        ]
