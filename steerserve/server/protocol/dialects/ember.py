"""Goodfire Ember's `controller`, as its SDK serialises it, translated into interventions.

A DLM has no next token, so what Ember gates by one (`min_nudge_entropy`, ...) has no meaning here and is refused, and
so are events (`event_name`), which Ember's SDK turned into exceptions: `steering.abort_when` ends a row. What is pushed
is pushed at every position of every step, as Ember did. A scope's interventions push while its conditions on features
hold: a feature is compared by its largest activation over the response, masked positions included, in shares of the
largest one known, as the values of interventions are; the reading of one step decides about the next.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from steerserve.engine.api.params import FeatureRef, Intervention
from steerserve.server.protocol import fields
from steerserve.server.protocol.fields import Name, Strength, Strict
from steerserve.steering.names import Operator, Unit

Mode = Literal["nudge", "pin", "mul"]
MODES: Final[dict[Mode, tuple[Operator, Unit | None]]] = {
    "nudge": ("add", "max_act"),
    "pin": ("clamp", "max_act"),
    "mul": ("multiply", None),
}
"""Operator and unit of each mode. Ember's values are shares of a feature's largest activation; ours is the one measured
for the SAE that is loaded. `clamp` sets the feature's activation, and `multiply` scales it."""

BOUNDS: Final = {
    ">": ("above",),
    "<": ("below",),
    ">=": ("at_least",),
    "<=": ("at_most",),
    "==": ("at_least", "at_most"),
    "!=": ("at_least", "at_most"),
}
"""The bounds of each comparison; those of `!=` are negated."""


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

    mode: Mode
    features: EmberFeatures
    value: Strength


class EmberCompared(Strict):
    """What is compared: one feature, since of a group Ember does not say what it compared."""

    features: list[EmberFeature] = Field(min_length=1, max_length=1)


class EmberConditional(Strict):
    """A comparison of a feature with a number."""

    left_hand: EmberCompared
    right_hand: Strength
    operator: Literal[">", "<", ">=", "<=", "==", "!="]

    def condition(self, sae: str) -> dict[str, Any]:
        """It as a condition of ours."""
        named = {"sae": sae, "index": self.left_hand.features[0].index_in_sae}
        bounds = dict.fromkeys(BOUNDS[self.operator], self.right_hand)
        found: dict[str, Any] = {"feature": named, "unit": "max_act", "over": "max", **bounds}
        return {"not": found} if self.operator == "!=" else found


class EmberConditionals(Strict):
    """Comparisons, joined."""

    conditionals: list[EmberConditional] = Field(min_length=1, max_length=16)
    operator: Literal["AND", "OR"] = "AND"

    def condition(self, sae: str) -> dict[str, Any]:
        """They as a condition of ours."""
        parts = [one.condition(sae) for one in self.conditionals]
        return parts[0] if len(parts) == 1 else {"all" if self.operator == "AND" else "any": parts}


class EmberScoped(Strict):
    """The controller of a scope."""

    interventions: list[EmberIntervention] = Field(default=[], max_length=256)
    scopes: Annotated[Any, fields.neutral([])] = None
    name: str | None = Field(default=None, max_length=200)
    nonzero_strength_threshold: Annotated[Any, fields.neutral()] = None
    min_nudge_entropy: Annotated[Any, fields.neutral()] = None
    max_nudge_entropy: Annotated[Any, fields.neutral()] = None


class EmberScope(Strict):
    """Interventions that hold under conditions."""

    conditionals: EmberConditionals
    controller: EmberScoped
    is_active: Annotated[Any, fields.neutral(False)] = None
    event_name: Annotated[Any, fields.neutral()] = None


class EmberController(EmberScoped):
    """The controller; scopes are one level deep."""

    scopes: list[EmberScope] = Field(default=[], max_length=64)


class Ember(Strict):
    """A controller, and the SAE that its indices count in, which Ember's models had but one of."""

    sae: Name
    controller: EmberController

    def translate(self) -> list[tuple[Intervention, str]]:
        """Our interventions, each with the field it comes from."""
        found = list(self._pushes(self.controller, "controller", None))
        for i, scope in enumerate(self.controller.scopes):
            condition = scope.conditionals.condition(self.sae)
            found += self._pushes(scope.controller, f"controller.scopes[{i}].controller", condition)
        return found

    def _pushes(
        self, controller: EmberScoped, path: str, when: dict[str, Any] | None
    ) -> Iterator[tuple[Intervention, str]]:
        for i, one in enumerate(controller.interventions):
            for k, feature in enumerate(one.features.features):
                intervention = Intervention(
                    feature=FeatureRef(self.sae, feature.index_in_sae),
                    strength=one.value,
                    op=MODES[one.mode][0],
                    unit=MODES[one.mode][1],
                    scope="all",
                    schedule="uniform",
                    when=when,
                )
                yield intervention, f"{path}.interventions[{i}].features.features[{k}]"
